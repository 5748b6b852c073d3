"""`fibkv calibrate`: moments, the file, what is recommended, and the cache that uses it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config

from fibkv import embedded
from fibkv.attention_errors import AttentionErrors
from fibkv.calibrate import CalibrateSettings, allocate_rungs, run_calibrate
from fibkv.calibration_file import Calibration, Sensitivity, StampedInfo, tensors_digest
from fibkv.errors import ContractError, DigestMismatch, EncodingError
from fibkv.hf import Cache
from fibkv.hf_argument import with_cache
from fibkv.hf_attention import attention
from fibkv.hf_observe import observe
from fibkv.hf_restore import restore
from fibkv.ladder import Ladder
from fibkv.parameters import named_parameters
from fibkv.pool import Pool
from fibkv.prompts import spread_windows
from fibkv.regions import QualityBudget
from fibkv.store import MemoryStore

SMALL = CalibrateSettings(num_windows=3, window_tokens=128, trial_windows=1, num_queries=8)
NOTHING = AttentionErrors(
    logit_mse=0.0, attention_tv=0.0, attention_kl=0.0, topk_agreement=1.0, value_aggregation_mse=0.0
)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return embedded.load()


def _run(loaded: tuple[Any, Any], path: Path, progress: Any = lambda *_: None, **change: Any) -> Calibration:
    settings = SMALL.model_copy(update=change)
    text = embedded.heldout_text()[:60_000]
    return run_calibrate(*loaded, [text], path, settings=settings, progress=progress)


@pytest.fixture(scope="module")
def path(loaded: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "small.safetensors"
    _run(loaded, path)
    return path


def test_moments_are_those_of_the_observed_vectors(loaded: tuple[Any, Any], path: Path) -> None:
    text = embedded.heldout_text()[:60_000]
    windows = spread_windows(loaded[1], text, num_windows=3, window_tokens=128)
    seen = [observe(loaded[0], ids)[2] for ids in windows]
    keys = torch.cat([one.keys[0, 1] for one in seen]).double()
    queries = torch.cat([one.query[0, head] for one in seen for head in (2, 3)]).double()
    found = Calibration.load(path).statistics[2]
    assert found.tokens == 3 * 128
    assert torch.allclose(found.key_mean[1], keys.mean(0))
    assert torch.allclose(found.key_moment[1], keys.T @ keys / len(keys))
    assert torch.allclose(found.query_moment[1], queries.T @ queries / len(queries))


def test_an_interrupted_run_goes_on_and_ends_the_same(
    loaded: tuple[Any, Any], path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = tmp_path / "again.safetensors"
    partial = tmp_path / "again.safetensors.partial"

    def interrupt(label: str, done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run(loaded, again, interrupt)
    assert partial.exists()
    assert not again.exists()
    observed = []
    monkeypatch.setattr("fibkv.calibrate.observe", lambda model, ids: observed.append(ids) or observe(model, ids))
    _run(loaded, again)
    assert len(observed) == 1, "the windows were read before; one is looked at for the errors of heads"
    assert again.read_bytes() == path.read_bytes()
    assert [one.name for one in tmp_path.iterdir()] == ["again.safetensors"]


def test_it_measures_what_it_recommends(path: Path) -> None:
    info = Calibration.load(path).info
    best = info.recommendation
    assert best.bits <= best.target_bits == 3.5
    assert best.kl <= best.uniform_kl
    assert len(info.sensitivities) == 4 * (2 * 3 + 3)
    assert [one.profile for one in info.spaces if one.space == "klt"] == ["klt2", "klt2.5", "klt3"]
    for layer in range(4):
        for role in ("key", "value"):
            ladder = [one for one in info.sensitivities if (one.layer, one.role) == (layer, role)]
            for codes in ("klt", "key" if role == "key" else ("fib", "value")):
                kls = [one.kl for one in ladder if one.profile.startswith(codes)]
                assert kls == sorted(kls, reverse=True)
            assert all(len(one.heads) == 2 for one in ladder)
            exact = {one.logit_mse if role == "value" else one.value_aggregation_mse for s in ladder for one in s.heads}
            assert exact == {0.0}, "the other role is exact"


def test_a_cache_uses_it(loaded: tuple[Any, Any], path: Path) -> None:
    calibration = Calibration.load(path)
    cache = Cache(loaded[0], calibration=path)
    for layer, (keys, values) in calibration.choices().items():
        assert cache.settings.names(layer) == (keys, values)
        expected = calibration.space(layer, calibration.best_space(keys))
        assert cache.settings.key_spaces.get(layer) == expected
    fixed = Cache(loaded[0], profile="fib2", calibration=calibration)
    assert fixed.settings.names(3) == ("fib2", "fib2")
    assert set(fixed.settings.key_spaces) in (set(), {0, 1, 2, 3})
    with pytest.raises(ContractError, match=r"Cache\.layer_profiles: expected layers below 4"):
        Cache(loaded[0], layer_profiles={4: ("fib2", "fib2")})


def test_klt_codes_are_those_of_the_layers(loaded: tuple[Any, Any], path: Path) -> None:
    """Another digest for another allocation or space, so that pages of another calibration are refused."""
    calibration = Calibration.load(path)
    cache = Cache(loaded[0], profile=("klt2", "fib2"), calibration=path, read_through=True)
    ids = loaded[1](embedded.heldout_text()[-4000:], return_tensors="pt")["input_ids"][:, :200]
    with attention(loaded[0]), torch.no_grad():
        logits = loaded[0](input_ids=ids, **with_cache(cache)).logits
        dense = loaded[0](input_ids=ids).logits
    divergence = (dense.softmax(-1) * (dense.log_softmax(-1) - logits.log_softmax(-1))).sum(-1).mean()
    assert 0 < float(divergence) < 0.3
    digests = set()
    for layer in cache.layers:
        coder = layer.store.settings.keys
        assert coder.profile.codec == calibration.klt_parameters(layer.index, "klt2")
        assert coder.profile.codec.vector_bits == 128
        assert coder.space == calibration.space(layer.index, "klt")
        assert {page.keys[0].codec.name for page in layer.store.pages()} == {"klt"}
        digests.add(coder.profile_digest)
    assert len(digests) == 4
    assert cache.settings.names(0) == ("klt2", "fib2"), "reports and budgets speak of the name"


def test_stored_prefixes_are_bound_to_the_allocation(loaded: tuple[Any, Any], path: Path) -> None:
    model, store = loaded[0], MemoryStore()
    ids = torch.randint(0, 500, (1, 200), generator=torch.Generator().manual_seed(0))
    settings = {"profile": ("klt2", "fib2"), "calibration": path}
    cache = Cache(model, **settings)
    with attention(model), torch.no_grad():
        model(ids, **with_cache(cache))
        assert cache.save(store, ids, name="m").failure is None
        restored = restore(model, ids, store, name="m", **settings)
        assert restored.restored.tokens == 199
        cache.crop_to(199)
        expected, found = (model(ids[:, -1:], **with_cache(one)).logits for one in (cache, restored))
    assert torch.equal(expected, found)
    other = restore(model, ids, store, name="m", profile=("klt2.5", "fib2"), calibration=path)
    assert other.restored.tokens == 0


def test_bits_take_klt_codes_only_where_they_measured_better(loaded: tuple[Any, Any], path: Path) -> None:
    calibration = Calibration.load(path)
    lowest = {name: min(one.kl for one in calibration.info.spaces if one.profile == name) for name in ("key2", "klt2")}
    assert lowest["klt2"] < lowest["key2"]
    for bits, names in ((2, ("klt2", "fib2")), (2.5, ("klt2", "value3")), (4, ("key4", "value4"))):
        cache = Cache(loaded[0], bits=bits, calibration=calibration)
        assert {cache.settings.names(layer) for layer in range(4)} == {names}
    worse = tuple(one.model_copy(update={"kl": 9.0}) if one.space == "klt" else one for one in calibration.info.spaces)
    other = Calibration(calibration.info.model_copy(update={"spaces": worse}), calibration.statistics)
    assert (other.best_keys("key2"), other.best_keys("fib2")) == ("key2", "fib2")
    spaces = {0: calibration.space(0, "mean")}
    cache = Cache(loaded[0], bits=2, calibration=calibration, key_spaces=spaces)
    assert cache.settings.names(0) == ("key2", "fib2"), "klt codes would need spaces of their own"


def test_klt_codes_are_refused_without_a_calibration_and_for_values(loaded: tuple[Any, Any], path: Path) -> None:
    with pytest.raises(ContractError, match=r"Cache\.calibration: expected one of the model beside klt codes"):
        Cache(loaded[0], profile=("klt2", "fib2"))
    with pytest.raises(ContractError, match=r"Cache\.profile: expected another codec for values than klt"):
        Cache(loaded[0], profile="klt2", calibration=path)
    with pytest.raises(ContractError, match=r"Cache\.layer_profiles\[1\]: expected another codec for values"):
        Cache(loaded[0], layer_profiles={1: ("fib2", "klt3")}, calibration=path)
    with pytest.raises(ContractError, match=r"a calibration of the model beside keys of klt3"):
        named_parameters("klt3", 64, "f32")
    with pytest.raises(ContractError, match=r"Ladder\.q4: expected codecs that need no calibration, got 'klt3'"):
        Cache(loaded[0], pool=Pool(budget="1 MiB", ladder=Ladder(q4=("klt3", "fib2"))))
    foreign = Calibration.load(path).klt_parameters(0, "klt2").of_heads(0, 1)
    cache = Cache(loaded[0], profile=(foreign, "fib2"))
    with pytest.raises(ContractError, match=r"Profile\.codec\.heads: expected 2 of the shape, got 1"):
        cache.update(torch.zeros(1, 2, 3, 64), torch.zeros(1, 2, 3, 64), 0)


def test_a_budget_keeps_raw_what_breaks_it(loaded: tuple[Any, Any], path: Path) -> None:
    info = Calibration.load(path).info
    worst = {
        one.layer: max(head.attention_tv for head in one.heads)
        for one in info.sensitivities
        if (one.role, one.profile) == ("key", "key2")
    }
    bound = sorted(worst.values())[1]  # two of the four layers keep it
    budget = QualityBudget(max_attention_tv=bound)
    cache = Cache(loaded[0], profile=("key2", "fib2"), calibration=path, quality_budget=budget)
    for layer, value in worst.items():
        assert cache.settings.names(layer) == ("key2" if value <= bound else "raw", "fib2")
    violations = cache.report().budget_violations
    assert {one.layer for one in violations} == {layer for layer, value in worst.items() if value > bound}
    assert all(one.measured > one.allowed == bound for one in violations)
    assert re.search(r"raw for the budget: layer \d keys: head \d in key2 has max_attention_tv", str(cache.report()))
    with attention(loaded[0]), torch.no_grad():
        loaded[0](input_ids=torch.arange(200)[None], **with_cache(cache))
    raw = {layer.layer for layer in cache.report().layers if "raw_strategy" in dict(layer.raw_vectors)}
    assert raw == {one.layer for one in violations}


def test_budgets_that_cannot_be_kept_are_refused(loaded: tuple[Any, Any], path: Path) -> None:
    closed = QualityBudget(max_value_aggregation_mse=0.0, fallback_on_violation="fail_closed")
    with pytest.raises(ContractError, match=r"max_value_aggregation_mse: .* layer 0 head 0 value in value4"):
        Cache(loaded[0], bits=4, calibration=path, quality_budget=closed)
    with pytest.raises(ContractError, match="a calibration beside it"):
        Cache(loaded[0], quality_budget=closed)
    with pytest.raises(
        ContractError, match=r"measured \(fib2, key2, .*, klt2, klt2\.5, klt3, value3, value4\), got 'int8'"
    ):
        Cache(loaded[0], profile="int8", calibration=path, quality_budget=closed)
    assert Cache(loaded[0], profile=("raw", "raw"), calibration=path, quality_budget=closed).budget_violations == ()


def test_pages_are_measured_when_they_are_sealed(loaded: tuple[Any, Any], path: Path) -> None:
    """A budget that the calibration's errors keep, and one page whose values are a hundred times as large."""
    info = Calibration.load(path).info
    measured = [one for one in info.sensitivities if (one.role, one.profile) == ("value", "fib2")]
    budget = QualityBudget(
        max_value_aggregation_mse=3 * max(h.value_aggregation_mse for o in measured for h in o.heads)
    )
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 2, 320, 64, generator=generator)
    values = 0.01 * torch.randn(2, 2, 320, 64, generator=generator)
    values[1, :, 128:192] *= 1e4

    def fill(**options: Any) -> Cache:
        cache = Cache(loaded[0], bits=2, calibration=path, quality_budget=budget, **options)
        assert cache.budget_violations == ()
        cache.update(keys, values, 0)
        return cache

    cache = fill(sample_pages=1)
    assert dict(cache.report().layers[0].raw_vectors)["quality_budget"] == 2 * 64
    found = cache.report().budget_violations
    assert {(one.layer, one.role, one.profile, one.start) for one in found} == {(0, "value", "fib", 128)}
    assert "raw for the budget: layer 0 values at token 128: head 0 in fib has max_value" in str(cache.report())
    decoded = cache.layers[0].store.view().decode(torch.float32)[1]
    assert torch.equal(decoded[1, :, 128:192], values[1, :, 128:192])
    assert not torch.equal(decoded[0, :, 128:192], values[0, :, 128:192])
    assert not fill(sample_pages=3).report().budget_violations, "page 2 is not among pages 0 and 3"
    assert not fill().report().budget_violations
    budget = budget.model_copy(update={"fallback_on_violation": "fail_closed"})
    with pytest.raises(EncodingError, match="quality budget, layer 0 values at token 128: head 0 in fib"):
        fill(sample_pages=2)
    with pytest.raises(ContractError, match=r"Cache\.sample_pages: expected a positive number, got 0"):
        fill(sample_pages=0)
    with pytest.raises(ContractError, match="a quality budget and a calibration beside it"):
        Cache(loaded[0], sample_pages=1)


def test_another_model_is_refused(path: Path) -> None:
    with pytest.raises(DigestMismatch, match=r"Calibration\.model_digest"):
        Cache(Qwen2Config(), calibration=path)


def test_damage_is_refused(path: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(DigestMismatch, match=r"Calibration\.tensors_digest"):
        Calibration.load(damaged)
    save_file(load_file(path), damaged)
    with pytest.raises(ContractError, match="metadata 'fibkv'"):
        Calibration.load(damaged)
    damaged.write_text("nothing of the kind")
    with pytest.raises(ContractError, match="a safetensors file"):
        Calibration.load(damaged)


def test_moments_of_another_dtype_are_refused(path: Path, tmp_path: Path) -> None:
    """They would make other spaces, under the digest of these: whether or not somebody stamped them anew."""
    narrow = {name: tensor.float() for name, tensor in load_file(path).items()}
    info = Calibration.load(path).info
    for digest, error, match in (
        (info.tensors_digest, DigestMismatch, r"Calibration\.tensors_digest"),
        (tensors_digest(narrow), ContractError, r"LayerStatistics\.key_moment: expected float64.*torch\.float32"),
    ):
        changed = info.model_copy(update={"tensors_digest": digest})
        stamped = StampedInfo(digest=changed.digest(), info=changed)
        save_file(narrow, tmp_path / "narrow.safetensors", {"fibkv": stamped.to_json()})
        with pytest.raises(error, match=match):
            Calibration.load(tmp_path / "narrow.safetensors")


def _ladder(layer: int, role: Any, kls: tuple[float, float]) -> list[Sensitivity]:
    return [
        Sensitivity(layer=layer, role=role, profile=profile, bits=bits, kl=kl, heads=(NOTHING,))
        for profile, bits, kl in zip(("fib2", "fib4"), (2.0, 4.0), kls, strict=True)
    ]


def test_bits_go_where_they_lower_kl_most() -> None:
    ladders = [*_ladder(0, "key", (1.0, 0.1)), *_ladder(0, "value", (0.3, 0.1))]
    assert allocate_rungs(ladders, 2.0) == {0: ("fib2", "fib2")}
    assert allocate_rungs(ladders, 3.0) == {0: ("fib4", "fib2")}
    assert allocate_rungs(ladders, 4.0) == {0: ("fib4", "fib4")}
    worse = [*_ladder(0, "key", (0.1, 0.2)), *_ladder(0, "value", (0.3, 0.1))]
    assert allocate_rungs(worse, 4.0) == {0: ("fib2", "fib4")}
    with pytest.raises(ContractError, match=r"at least 2\.000"):
        allocate_rungs(ladders, 1.9)
