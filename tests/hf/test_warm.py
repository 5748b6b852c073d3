"""Warming up: afterwards a model needs no kernel that it has not used, and the cache is as it was."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import fibkv
from fibkv import hf_warm
from fibkv.hf_argument import with_cache
from fibkv.kernels import triton
from fibkv.regions import ProtectedRegions
from tests.hf.models import COMMON, build, prompt

POLICY = fibkv.Policy.per_token(ProtectedRegions(first_tokens_raw=4, last_tokens_raw=32))
# What a launch is compiled for, as far as the interpreter sees it.
CONSTANTS = ("KEY", "VALUE", "PAGED", "BIASED", "MASK", "SOFTCAP", "QUERIES", "TOKENS", "num_warps", "num_stages")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[tuple[object, ...]]:
    """The kernels of attention that were launched, by what they are compiled for."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    kernels: set[tuple[object, ...]] = set()
    run = interpreter.InterpretedFunction.run

    def noted(self: object, *args: object, **kwargs: object) -> object:
        kernels.add((self.__name__, *(kwargs.get(name) for name in CONSTANTS)))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", noted)
    return kernels


@pytest.mark.skipif(triton.why_not("cpu") != "yes", reason=f"triton: {triton.why_not('cpu')}")
def test_steps_after_it_launch_nothing_new(launched: set[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_warm, "STEPS", tuple(count for count in hf_warm.STEPS if count <= 16))
    # One head: the interpreter takes its time for each query of each head.
    small = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**{**COMMON, **small})).eval()
    cache = fibkv.Cache(model, profile="int8", tokens_per_page=32, policy=POLICY, implementation="triton")
    with fibkv.attention(model), torch.no_grad():
        cache.warm_up(model)
        assert cache.get_seq_length() == 0
        known = set(launched)
        assert {name for name, *_ in known} > {"attend_splits", "merge_splits"}
        ids, past = prompt(1, 106), 0
        for tokens in (95, 1, 1, 9):
            model(ids[:, past : past + tokens], **with_cache(cache))
            past += tokens
    assert len(cache.layers[0].store.rows[0]) == 2
    assert launched == known


def test_a_filled_cache_stays_as_it_is_and_rows_are_also_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    cache = fibkv.Cache(model, bits=4, tokens_per_page=16, implementation="reference")
    masks = []
    forward = model.forward

    def noted(*args: object, attention_mask: torch.Tensor | None = None, **kwargs: object) -> object:
        masks.append(attention_mask)
        return forward(*args, attention_mask=attention_mask, **kwargs)

    with fibkv.attention(model), torch.no_grad():
        model(prompt(1, 100), **with_cache(cache))
        before = [[page.digest for page in layer.store.rows[0]] for layer in cache.layers]
        monkeypatch.setattr(model, "forward", noted)
        cache.warm_up(model, rows=2)
    assert cache.get_seq_length() == 100
    assert [[page.digest for page in layer.store.rows[0]] for layer in cache.layers] == before
    assert any(mask is None for mask in masks)
    padded = [mask for mask in masks if mask is not None]
    assert padded
    assert all(mask.shape[0] == 2 and not mask[0, 0] and mask[1].all() for mask in padded)
