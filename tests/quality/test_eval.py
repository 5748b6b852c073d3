from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig

from fibkv.errors import ContractError, DigestMismatch
from fibkv.eval_caches import eval_variants, fibkv_variant
from fibkv.eval_result import QUICK, EvalReceipt, EvalResult
from fibkv.eval_view import frontier, plot_eval, render_eval
from fibkv.evaluate import run_eval
from fibkv.hf import Cache
from fibkv.hf_argument import cache_of
from fibkv.hf_model import model_digest
from fibkv.hf_observe import observe
from fibkv.policy import Policy
from fibkv.regions import ProtectedRegions
from fibkv.simulated import Kivi, SimulatedCache, affine

PROTECTED = ProtectedRegions(first_tokens_raw=4, last_tokens_raw=16)
NAMES = ("int8", "fib4", "fib2", "trellis2", "kivi2", "tf-fp8")


@pytest.fixture(scope="module")
def result(loaded: tuple[Any, Any], text: str) -> EvalResult:
    model, tokenizer = loaded
    variants, skipped = eval_variants(model, PROTECTED, NAMES)
    settings = QUICK.model_copy(update={"sinks": 4, "window": 16})
    return run_eval(
        model,
        tokenizer,
        text,
        name="small",
        variants=variants,
        skipped=skipped,
        settings=settings,
        caveats=(),
        progress=lambda *_: None,
    )


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_the_simulated_kivi_is_the_affine_codec_along_its_axes(bits: int) -> None:
    """The same numbers from a real cache, with pages of one group."""
    policy = Policy.role_aware_baseline().model_copy(update={"protected": ProtectedRegions()})
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1)
    real = Cache(config, profile=f"affine{bits}", policy=policy, tokens_per_page=32, read_through=True)
    simulated = SimulatedCache(1, Kivi(bits), ProtectedRegions(), read_through=True)
    generator = torch.Generator().manual_seed(bits)
    keys, values = (torch.randn(1, 2, 200, 64, generator=generator) + 3 for _ in range(2))
    for chunk in (slice(0, 128), slice(128, 200)):
        expected = simulated.update(keys[:, :, chunk], values[:, :, chunk], 0)
        real.update(keys[:, :, chunk], values[:, :, chunk], 0)
    found = real.layers[0].store.view().decode(torch.float32)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    page = next(iter(real.layers[0].store.pages()))
    assert sum(segment.codes.nbytes for segment in (*page.keys, *page.values)) == 2 * 2 * 32 * 64 * (bits + 1) / 8


def test_every_figure_falls_with_the_bits(result: EvalResult) -> None:
    rows = {row.name: row for row in result.rows}
    assert set(rows) == set(NAMES)
    assert result.passed
    int8, fib4, fib2 = rows["int8"], rows["fib4"], rows["fib2"]
    assert int8.codec_bits > fib4.codec_bits > fib2.codec_bits
    assert int8.quality.kl_mean < fib4.quality.kl_mean < fib2.quality.kl_mean
    assert sum(int8.drift) < sum(fib4.drift) < sum(fib2.drift)
    for name in ("logit_mse", "attention_tv", "attention_kl", "value_aggregation_mse"):
        values = [getattr(row.mean_errors, name) for row in (int8, fib4, fib2)]
        assert values == sorted(values), name
    assert [(one.layer, one.head) for one in fib4.heads] == [(layer, head) for layer in range(4) for head in range(2)]
    assert rows["kivi2"].codec_bits == pytest.approx(3.0, abs=0.2)  # its last groups are short


def test_a_trellis_is_better_than_a_book_at_the_same_bits(result: EvalResult) -> None:
    rows = {row.name: row for row in result.rows}
    trellis2, fib2 = rows["trellis2"], rows["fib2"]
    # Beside the codes, which are as long, there are tables.
    assert trellis2.codec_bits == pytest.approx(fib2.codec_bits, abs=0.1)
    assert trellis2.quality.kl_mean < 0.9 * fib2.quality.kl_mean
    assert trellis2.mean_errors.value_aggregation_mse < 0.85 * fib2.mean_errors.value_aggregation_mse


def test_every_cache_keeps_the_same_tokens_raw(result: EvalResult) -> None:
    per_token = 4 * 2 * 2 * 64
    assert {row.raw_elements for row in result.rows} == {20 * per_token}
    assert all(row.all_bits > row.codec_bits for row in result.rows if row.name != "fib2")


def test_receipts_are_stamped(result: EvalResult) -> None:
    receipt = EvalReceipt.of(result)
    assert EvalReceipt.from_json(receipt.to_json()) == receipt
    data = json.loads(receipt.to_json())
    data["result"]["rows"][0]["quality"]["kl_mean"] = 0.0
    with pytest.raises(DigestMismatch, match=r"EvalReceipt\.digest"):
        EvalReceipt.from_json(json.dumps(data))


def test_view_and_frontier(result: EvalResult, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=104)
    console.print(render_eval(result))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "…" not in shown
    assert all(row.title in shown for row in result.rows)
    best = frontier(result.rows)
    assert [row.quality.kl_mean for row in best] == sorted((row.quality.kl_mean for row in best), reverse=True)
    plot_eval(result, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG"


def test_unknown_caches_are_refused(model: Any) -> None:
    with pytest.raises(ContractError, match=r"caches: expected some of bits4.*got \['nonsense'\]"):
        eval_variants(model, PROTECTED, ("nonsense",))


def test_simulated_caches_seal_what_fibkv_seals(model: Any) -> None:
    """A quantizer that gives zeros shows which tokens went through it: those that fibkv's pages compress."""
    for read_through, tokens in ((True, 100), (False, 100), (False, 200)):
        simulated = SimulatedCache(1, lambda rows, role: (0 * rows, 1), PROTECTED, read_through=read_through)
        variant = fibkv_variant("fib4", "", PROTECTED, profile="fib4")
        cache = variant.make_cache(model, read_through=read_through)
        assert isinstance(cache, Cache)
        for part in torch.ones(1, 2, tokens, 64).split(60, 2):
            simulated.update(part, part, 0)
            cache.update(part, part, 0)
        keys = simulated.layers[0].keys
        assert keys is not None
        raw = int(keys[0, 0, :, 0].sum())
        assert raw == cache.report().layers[0].raw_elements // (2 * 2 * 64)
        assert raw * 2 * 2 * 64 == simulated.report().layers[0].raw_elements


def test_new_tokens_are_read_exactly_in_use_and_coded_with_read_through() -> None:
    rows = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    for read_through in (True, False):
        cache = SimulatedCache(1, Kivi(2), ProtectedRegions(), read_through=read_through)
        keys, values = cache.update(rows, rows, 0)
        assert keys.equal(rows) == values.equal(rows) == (not read_through)
        again, _ = cache.update(rows[:, :, :1], rows[:, :, :1], 0)
        assert not again[:, :, :64].equal(rows)


@pytest.mark.parametrize("dim", [-1, -2])
def test_affine_groups(dim: int) -> None:
    rows = torch.randn(1, 2, 48, 64, generator=torch.Generator().manual_seed(1)) + 5
    decoded, nbytes = affine(rows, 8, 32, dim)
    groups = 2 * 48 * 2 if dim == -1 else 2 * 2 * 64
    assert nbytes == rows.numel() + 4 * groups
    assert (decoded - rows).abs().max() < 0.04
    coarse, _ = affine(rows, 2, 32, dim)
    first = coarse[0, 0, 0, :32] if dim == -1 else coarse[0, 0, :32, 0]
    assert len(first.unique()) <= 4
    assert affine(torch.full((1, 1, 4, 4), 3.0), 2, 32, dim)[0].eq(3).all()


def test_observed_tensors_are_those_that_the_cache_gets(model: Any) -> None:
    ids = torch.arange(20)
    with torch.no_grad():
        dense = cache_of(model(input_ids=ids[None], use_cache=True))
    seen = observe(model, ids)
    assert [one.layer for one in seen] == [0, 1, 2, 3]
    for one, layer in zip(seen, dense.layers, strict=True):
        assert torch.allclose(one.keys, layer.keys, atol=1e-5)
        assert torch.allclose(one.values, layer.values, atol=1e-5)
        assert one.query.shape == (1, 4, 20, 64)
        assert one.scale == 64**-0.5


def test_the_models_digest_is_of_its_configuration(model: Any) -> None:
    before = model_digest(model.config)
    assert before == model_digest(model.config)
    theta = model.config.rms_norm_eps
    try:
        model.config.rms_norm_eps = 1e-5
        assert model_digest(model.config) != before
    finally:
        model.config.rms_norm_eps = theta
