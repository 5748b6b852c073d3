from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from fibkv.contract import Contract
from fibkv.errors import ModelError
from fibkv.hf import Cache
from fibkv.hf_attention import attention
from fibkv.prompts import NeedlePrompt, spread_windows
from fibkv.quality import (
    CacheVariant,
    cached_logits,
    count_recalled,
    decode_speed,
    dense_logits,
    poison,
    score_tokens,
    summarize,
)
from fibkv.quality_result import PoisonOutcome
from fibkv.report import CacheReport
from tests.quality.fakes import RoundingCache, variant


@pytest.fixture(scope="module")
def ids(tokenizer: Any, text: str) -> torch.Tensor:
    return spread_windows(tokenizer, text, num_windows=1, window_tokens=300)[0]


@pytest.mark.parametrize("chunk_tokens", [1, 128, 300, 1000])
def test_chunks_through_a_dense_cache_equal_one_forward(model: Any, ids: torch.Tensor, chunk_tokens: int) -> None:
    logits = cached_logits(model, ids, RoundingCache(levels=0), chunk_tokens=chunk_tokens)
    assert logits.shape == (300, 2048)
    assert torch.allclose(logits, dense_logits(model, ids), atol=2e-4, rtol=0)


def test_every_chunk_is_read_through_the_cache(model: Any, ids: torch.Tensor) -> None:
    coarse = cached_logits(model, ids, RoundingCache(levels=3), chunk_tokens=100)
    change = (coarse - dense_logits(model, ids)).abs().amax(-1)
    assert (change > 1e-3).all(), "the first token's own key and value are coarse too, so every position must move"


def test_scores_of_dense_against_itself(model: Any, ids: torch.Tensor) -> None:
    dense = dense_logits(model, ids)
    quality = summarize([score_tokens(dense, dense, ids)])
    assert (quality.kl_mean, quality.kl_p99, quality.top1) == (0.0, 0.0, 1.0)
    assert 2 < quality.perplexity < 30


def test_summary_is_over_tokens_not_over_windows() -> None:
    dense = torch.zeros(4, 3)
    other = torch.tensor([[0.0, 0.0, 9.0]] + [[0.0] * 3] * 3)
    long, short = score_tokens(dense, dense, torch.zeros(4, dtype=torch.int64)), None
    short = score_tokens(dense[:2], other[:2], torch.zeros(2, dtype=torch.int64))
    quality = summarize([long, short])
    assert quality.top1 == pytest.approx(3 / 4)
    assert quality.kl_mean == pytest.approx(short.kl.item() / 4)
    assert quality.kl_p99 == pytest.approx(short.kl.item() * 0.97)


def test_a_value_counts_only_if_each_of_its_tokens_is_first() -> None:
    ids = torch.tensor([5, 1, 2, 3, 4])
    prompt = NeedlePrompt(ids=ids, answers=((1, 3), (3, 5)))
    predicted = torch.tensor([1, 2, 3, 0, 0])  # row t predicts token t + 1; the last token of the second is wrong
    assert count_recalled(torch.nn.functional.one_hot(predicted, 6).float(), prompt) == 1


def test_poison_test_passes_where_pages_are_read(model: Any, ids: torch.Tensor) -> None:
    outcome = poison(model, variant("fake", 127), ids, chunk_tokens=128)
    assert outcome.passed
    assert outcome.moved > 1e-4


def test_poison_test_fails_where_pages_are_not_read(model: Any, ids: torch.Tensor) -> None:
    outcome = poison(model, variant("fake", 127, read=False), ids, chunk_tokens=128)
    assert outcome == PoisonOutcome(moved=0.0, restored=True)
    assert not outcome.passed


def test_poison_test_fails_where_damage_stays() -> None:
    assert not PoisonOutcome(moved=1.0, restored=False).passed


def test_poison_test_refuses_a_cache_that_compresses_nothing(model: Any, ids: torch.Tensor) -> None:
    class Idle(RoundingCache):
        def report(self) -> CacheReport:
            report = super().report()
            layers = tuple(layer.model_copy(update={"compressed": False}) for layer in report.layers)
            return report.model_copy(update={"layers": layers})

    idle = CacheVariant(
        name="idle", title="idle", make_cache=lambda _, *, read_through: Idle(0), attention=lambda _: nullcontext()
    )
    with pytest.raises(ModelError, match="no layer of this model is compressed: fake"):
        poison(model, idle, ids, chunk_tokens=128)


def test_decode_speed_counts_the_tokens_after_the_first(
    model: Any, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter([0.0, 100.0, 101.0, 102.0, 103.0])  # the prompt, then four tokens a second apart
    monkeypatch.setattr("fibkv.quality.perf_counter", lambda: next(ticks))
    assert decode_speed(model, ids[:20], new_tokens=4, cache=None) == 1.0
    assert next(ticks, None) is None


@pytest.mark.parametrize("profile", ["raw", "int8"])
def test_fibkv_caches_are_measured_on_their_pages(model: Any, ids: torch.Tensor, profile: str) -> None:
    cache = Cache(model, profile=profile, raw_dtype="bf16", read_through=True)
    with attention(model):
        logits = cached_logits(model, ids, cache, chunk_tokens=128)
    assert cache.report().materialized == 0
    quality = summarize([score_tokens(dense_logits(model, ids), logits, ids)])
    assert 0 < quality.kl_mean < 2e-3


def test_outcomes_are_contracts() -> None:
    assert issubclass(PoisonOutcome, Contract)
    assert PoisonOutcome.from_json('{"moved":0.5,"restored":true}') == PoisonOutcome(moved=0.5, restored=True)
