"""The benchmarks of a whole model: their rows are complete, and their checks fail where they should."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from fibkv import bench_prefill, bench_steps
from fibkv.bench_caches import (
    MATMUL_NAME,
    QUANTIZED,
    CacheContender,
    cache_contenders,
    dense_copy,
    fill,
    held_nbytes,
    random_llama,
)
from fibkv.bench_prefill import run_prefill
from fibkv.bench_result import CacheRow, ModelResult, PrefillResult, StepResult
from fibkv.bench_settings import QUICK_PREFILL, QUICK_STEPS
from fibkv.bench_steps import run_steps
from fibkv.hf import Cache
from fibkv.hf_argument import with_cache
from fibkv.hf_switch import switched
from fibkv.quality import CausalLM, fork_logits
from tests.bench.conftest import quiet

SMALL_STEPS = QUICK_STEPS.model_copy(update={"profiles": ("int8",), "rounds": 1})
SMALL_PREFILL = QUICK_PREFILL.model_copy(update={"profiles": ("int8",), "rounds": 1})


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return random_llama(QUICK_STEPS, 300)


def _rows(result: ModelResult) -> dict[str, CacheRow]:
    return {row.name: row for row in result.rows}


def _check_rows(result: StepResult | PrefillResult, calls: int) -> None:
    assert result.passed
    assert {"quanto 4-bit", "hqq 4-bit", "transformers fp8"} <= {row.name for row in result.rows} | dict(
        result.skipped
    ).keys()
    assert [row.name for row in result.rows if row.kind == "fibkv"] == [
        f"fibkv {profile}" for profile in result.settings.profiles
    ]
    for row in result.rows:
        assert row.figures is not None
        assert row.figures.timing.calls == calls
        assert (row.checks is None) == (row.kind == "quantized")
        assert row.checks is None or row.checks.materialized == 0


def test_steps_have_their_figures(step_result: StepResult) -> None:
    _check_rows(step_result, QUICK_STEPS.rounds * QUICK_STEPS.tokens)
    stock = [row.figures for row in step_result.rows if row.figures and row.kind != "fibkv"]
    assert (1.0, 0.0) in [(figures.speedup, figures.overhead) for figures in stock]
    assert StepResult.from_json(step_result.to_json()) == step_result


def test_prefill_has_its_figures(prefill_result: PrefillResult) -> None:
    _check_rows(prefill_result, QUICK_PREFILL.rounds)
    assert [row.name for row in prefill_result.rows if row.kind == "dense"] == ["DynamicCache sdpa"]
    dense = _rows(prefill_result)["DynamicCache sdpa"].figures
    assert dense is not None
    assert (dense.speedup, dense.overhead) == (1.0, 0.0)
    fib4 = _rows(prefill_result)["fibkv fib4"].figures
    assert fib4 is not None
    assert fib4.overhead is not None
    assert fib4.overhead > 0
    assert fib4.tokens_per_second == pytest.approx(QUICK_PREFILL.context / fib4.timing.mean)
    assert PrefillResult.from_json(prefill_result.to_json()) == prefill_result


def test_a_prompt_behind_a_filled_cache() -> None:
    settings = QUICK_PREFILL.model_copy(update={"cached": 300, "profiles": ("fib4", "int8")})
    result = run_prefill(settings, quiet)
    _check_rows(result, settings.rounds)
    # Of all tokens: the prompt's are held, too.
    dense = _rows(result)["DynamicCache sdpa"]
    assert dense.nbytes == 4 * settings.kv_heads * settings.head_dim * (300 + settings.context)
    assert dense.of_dense == 1


def test_sizes_are_counted(step_result: StepResult) -> None:
    rows = _rows(step_result)
    # Tokens that each turn fed: the one before, the untimed one, the timed ones but the last.
    tokens = QUICK_STEPS.context + QUICK_STEPS.rounds * (QUICK_STEPS.tokens + 1)
    assert rows["DynamicCache sdpa"].nbytes == 2 * 2 * 64 * tokens * 2  # both roles, heads, head_dim, bfloat16
    assert rows["DynamicCache sdpa"].of_dense == 1.0
    # The past in 8 bits, a scale per tensor; older releases of transformers have no such cache.
    fp8 = rows.get("transformers fp8")
    assert fp8.of_dense == pytest.approx(0.5, abs=1e-3) if fp8 else "transformers fp8" in dict(step_result.skipped)
    sizes = [rows[f"fibkv {profile}"].nbytes for profile in ("fib2", "fib4", "int8", "raw")]
    assert sizes == sorted(set(sizes))


def test_a_cache_that_is_decoded_instead_of_read_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under stock attention fibkv's caches answer rightly and pass the poison test, by way of dense copies."""

    def under_sdpa(model: CausalLM, settings: Any) -> Any:
        contenders, skipped = cache_contenders(model, settings)
        return [replace(contender, attention="sdpa") for contender in contenders], skipped

    monkeypatch.setattr(bench_steps, "cache_contenders", under_sdpa)
    result = run_steps(SMALL_STEPS, quiet)
    row = _rows(result)["fibkv int8"]
    assert row.checks is not None
    assert row.checks.poison.passed
    assert row.checks.materialized > 0
    assert row.figures is None
    assert not result.passed


def test_a_cache_that_is_not_read_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(Cache):
        """Keeps every key and value, and hands attention the newest ones only."""

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            super().update(key_states, value_states, layer_idx, *args, **kwargs)
            return key_states, value_states

    def forgetful(model: CausalLM, settings: Any) -> Any:
        contenders, skipped = cache_contenders(model, settings)
        return [*contenders[:2], CacheContender("forgetful", "fibkv", lambda: Forgetful(model), "fibkv")], skipped

    for module, run, settings in (
        (bench_steps, run_steps, SMALL_STEPS),
        (bench_prefill, run_prefill, SMALL_PREFILL),
    ):
        monkeypatch.setattr(module, "cache_contenders", forgetful)
        result = run(settings, quiet)
        row = _rows(result)["forgetful"]
        assert row.checks is not None
        assert row.checks.poison.moved == 0
        assert row.figures is None
        assert not result.passed


def test_matmul_attention_is_sdpa(model: CausalLM) -> None:
    token = torch.tensor([7])
    cache = DynamicCache(config=model.config)
    fill(cache, QUICK_STEPS, QUICK_STEPS.context)
    expected = fork_logits(model, cache, token)
    with switched(model, MATMUL_NAME):
        logits = fork_logits(model, cache, token)
        prefill = model(input_ids=torch.arange(20)[None]).logits
    assert 0 < (logits - expected).norm() / expected.norm() < 0.02
    assert torch.equal(prefill, model(input_ids=torch.arange(20)[None]).logits)


def test_matmul_attention_honors_a_mask(model: CausalLM) -> None:
    """Of a left-padded row: what is under the mask must not matter."""
    mask = torch.ones(1, 41, dtype=torch.long)
    mask[:, :10] = 0
    with switched(model, MATMUL_NAME):
        last = [
            model(
                input_ids=torch.tensor([[7]]),
                **with_cache(_padded(model, junk)),
                attention_mask=mask,
                position_ids=torch.tensor([[30]]),
            ).logits
            for junk in (0.0, 5.0)
        ]
    assert torch.equal(*last)


def _padded(model: CausalLM, junk: float) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    keys = torch.randn(1, 2, 40, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    keys[:, :, :10] = junk
    cache.update(keys, keys.clone(), 0)
    return cache


def test_weights_and_filling_follow_the_seed() -> None:
    before = torch.random.get_rng_state()
    first, again = (random_llama(QUICK_STEPS, 300) for _ in range(2))
    other = random_llama(QUICK_STEPS.model_copy(update={"seed": 1}), 300)
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [model.lm_head.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    dense, pages = DynamicCache(config=first.config), Cache(first, profile="raw")
    for cache in (dense, pages):
        fill(cache, QUICK_STEPS, QUICK_STEPS.context)
    assert torch.equal(dense_copy(pages, first).layers[0].keys, dense.layers[0].keys)


def test_bytes_of_stock_caches_are_those_of_their_memory() -> None:
    class Layer:
        def __init__(self) -> None:
            memory = torch.zeros(100)
            self.keys = memory[:10]
            self.again = memory[5:]
            self.nested = ((torch.zeros(3, dtype=torch.uint8), {"scale": torch.zeros(2)}), "text", 5)

    class Stock:
        layers = (Layer(), Layer())

    assert held_nbytes(Stock()) == 2 * (400 + 3 + 8)


def test_a_cache_that_cannot_be_made_is_skipped_with_its_reason(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(QUANTIZED, "unheard of", {"backend": "unheard of"})
    contenders, skipped = cache_contenders(model, QUICK_STEPS)
    assert dict(skipped)["unheard of"] == "Unknown quantization backend `unheard of`"
    assert "unheard of" not in {contender.name for contender in contenders}
    assert {type(contender.make()).__name__ for contender in contenders} >= {"DynamicCache", "Cache"}
