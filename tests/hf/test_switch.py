"""Switching a model's attention: contexts that are nested, and contexts of several threads that overlap."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Barrier

import torch
import transformers as tf
from torch import Tensor

import fibkv
from fibkv.hf_argument import with_cache
from fibkv.hf_attention import ATTENTION_NAME
from fibkv.hf_observe import OBSERVED_NAME, observed
from tests.hf.architectures import tiny
from tests.hf.calls import cache_for, generate, ids
from tests.hf.oracle import dequantized_cache

THREADS = 4


def implementation(model: tf.PreTrainedModel) -> str:
    return model.config._attn_implementation


def test_the_newest_context_decides() -> None:
    model = tiny("Llama")
    with fibkv.attention(model):
        checked = model.generate
        with observed(model, lambda _: None), fibkv.attention(model):
            assert implementation(model) == ATTENTION_NAME
            assert model.generate is checked
        assert implementation(model) == ATTENTION_NAME
        with observed(model, lambda _: None):
            assert implementation(model) == OBSERVED_NAME
        assert implementation(model) == ATTENTION_NAME
        assert model.generate is checked
    assert implementation(model) == "sdpa"
    assert "generate" not in vars(model)


def test_a_context_that_ends_early_leaves_the_others_theirs() -> None:
    """As of two threads: the first one in is the first one out."""
    model = tiny("Llama")
    first, second = ExitStack(), ExitStack()
    first.enter_context(fibkv.attention(model))
    second.enter_context(fibkv.attention(model))
    first.close()
    assert implementation(model) == ATTENTION_NAME
    assert "generate" in vars(model)
    second.close()
    assert implementation(model) == "sdpa"
    assert "generate" not in vars(model)


def test_threads_that_each_switch_read_pages() -> None:
    model = tiny("Llama")
    expected = generate(model, dequantized_cache(model, "fib4"), {"inputs": ids()})
    start = Barrier(THREADS)

    def answer(_: int) -> tuple[Tensor, int]:
        start.wait()
        cache = cache_for(model)
        for _again in range(4):
            cache.reset()
            with fibkv.attention(model):
                tokens = model.generate(ids(), **with_cache(cache), max_new_tokens=12, do_sample=False)
        return tokens, sum(layer.materialized for layer in cache.report().layers)

    with ThreadPoolExecutor(THREADS) as pool:
        answers = list(pool.map(answer, range(THREADS)))
    assert all(torch.equal(tokens, expected) and not decoded for tokens, decoded in answers)
    assert implementation(model) == "sdpa"
    assert "generate" not in vars(model)


def test_a_model_without_a_head_is_switched_too() -> None:
    model = tiny("Llama").model
    with fibkv.attention(model):
        assert implementation(model) == ATTENTION_NAME
    assert implementation(model) == "sdpa"
