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
from fibkv.calibration_file import Calibration, Sensitivity
from fibkv.errors import ContractError, DigestMismatch, EncodingError
from fibkv.hf import Cache
from fibkv.hf_attention import attention
from fibkv.hf_observe import observe
from fibkv.prompts import spread_windows
from fibkv.regions import QualityBudget

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
    assert len(info.sensitivities) == 4 * 2 * 3
    for layer in range(4):
        for role in ("key", "value"):
            ladder = [one for one in info.sensitivities if (one.layer, one.role) == (layer, role)]
            assert [one.kl for one in ladder] == sorted((one.kl for one in ladder), reverse=True)
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


def test_a_budget_keeps_raw_what_breaks_it(loaded: tuple[Any, Any], path: Path) -> None:
    info = Calibration.load(path).info
    worst = {
        one.layer: max(head.attention_tv for head in one.heads)
        for one in info.sensitivities
        if (one.role, one.profile) == ("key", "key2")
    }
    bound = sorted(worst.values())[1]  # two of the four layers keep it
    budget = QualityBudget(max_attention_tv=bound)
    cache = Cache(loaded[0], bits=2, calibration=path, quality_budget=budget)
    for layer, value in worst.items():
        assert cache.settings.names(layer) == ("key2" if value <= bound else "raw", "fib2")
    violations = cache.report().budget_violations
    assert {one.layer for one in violations} == {layer for layer, value in worst.items() if value > bound}
    assert all(one.measured > one.allowed == bound for one in violations)
    assert re.search(r"raw for the budget: layer \d keys: head \d in key2 has max_attention_tv", str(cache.report()))
    with attention(loaded[0]), torch.no_grad():
        loaded[0](input_ids=torch.arange(200)[None], past_key_values=cache)
    raw = {layer.layer for layer in cache.report().layers if "raw_strategy" in dict(layer.raw_vectors)}
    assert raw == {one.layer for one in violations}


def test_budgets_that_cannot_be_kept_are_refused(loaded: tuple[Any, Any], path: Path) -> None:
    closed = QualityBudget(max_value_aggregation_mse=0.0, fallback_on_violation="fail_closed")
    with pytest.raises(ContractError, match=r"max_value_aggregation_mse: .* layer 0 head 0 value in value4"):
        Cache(loaded[0], bits=4, calibration=path, quality_budget=closed)
    with pytest.raises(ContractError, match="a calibration beside it"):
        Cache(loaded[0], quality_budget=closed)
    with pytest.raises(ContractError, match=r"measured \(fib2, key2, key3, key4, value3, value4\), got 'int8'"):
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
