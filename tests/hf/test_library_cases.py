"""What transformers' own QuantizedCache cannot do, or does wrongly: the same calls on a compressed cache.

Its layers crop and repeat the raw residual only and leave the quantized part as it was, refuse models with windows,
and its fp8 backend keeps the scale of the first tokens for ever.
"""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from transformers.cache_utils import QuantizedCache

import fibkv
from fibkv.hf_argument import with_cache
from tests.hf.architectures import is_known, tiny
from tests.hf.calls import cache_for, generate, ids, logits_along
from tests.hf.oracle import dequantized_cache

CODECS = ["int8", "fp8", "fib4", "fib2"]


@pytest.mark.parametrize("profile", CODECS)
def test_crop_takes_back_quantized_tokens(profile: str) -> None:
    model = tiny("Llama")
    prompt, again = ids(1, 80), ids(1, 20, seed=1)
    cache = cache_for(model, profile=profile)
    with torch.no_grad(), fibkv.attention(model):
        model(prompt, **with_cache(cache))
        pages = [page.digest for page in cache.layers[0].store.rows[0]]
        cache.crop(-40)
        assert cache.get_seq_length() == 40
        assert [page.digest for page in cache.layers[0].store.rows[0]] == pages[:5]
        actual = model(again, **with_cache(cache)).logits
        rest = cache_for(model, profile=profile)
        model(prompt[:, :40], **with_cache(rest))
        expected = model(again, **with_cache(rest)).logits
    # The last 8 of the 40 tokens are quantized here and raw there.
    assert (actual - expected).square().mean().sqrt() < {"fib2": 0.5, "fib4": 0.1}.get(profile, 0.05) * expected.std()


@pytest.mark.parametrize("profile", CODECS)
def test_prompt_lookup_gives_the_tokens_of_greedy(profile: str) -> None:
    """Drafts that are taken back leave no trace: between two seals the tokens are those of plain decoding."""
    model = tiny("Llama")
    prompt = ids(1, 12).repeat(1, 5)
    expected = generate(
        model,
        dequantized_cache(model, profile),
        {"inputs": prompt, "prompt_lookup_num_tokens": 4, "max_new_tokens": 24},
    )
    cache = cache_for(model, profile=profile)
    with fibkv.attention(model):
        options = {"inputs": prompt, "prompt_lookup_num_tokens": 4, "max_new_tokens": 24}
        assert torch.equal(generate(model, cache, options), expected)
    assert cache.get_seq_length() == 83
    assert cache.report().layers[0].pages == (83 - 8) // 8


def test_an_assistant_drafts() -> None:
    model, assistant = tiny("Llama"), tiny("Llama", num_hidden_layers=1)
    options = {"inputs": ids(), "assistant_model": assistant, "max_new_tokens": 20}
    expected = generate(model, dequantized_cache(model, "fib4"), options)
    cache = cache_for(model)
    with fibkv.attention(model):
        assert torch.equal(generate(model, cache, options), expected)
    assert cache.report().materialized == 0


@pytest.mark.parametrize("profile", CODECS)
def test_rows_are_repeated_and_selected_with_their_quantized_part(profile: str) -> None:
    model = tiny("Llama")
    cache = cache_for(model, profile=profile)
    with torch.no_grad(), fibkv.attention(model):
        model(ids(2), **with_cache(cache))
        step = ids(2, 1, seed=1)
        expected = model(step, **with_cache(cache.fork())).logits
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        actual = model(step.flip(0), **with_cache(cache)).logits
    torch.testing.assert_close(actual.flip(0), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["Gemma3Text", "Qwen3Next"])
def test_models_that_are_not_all_full_attention(name: str) -> None:
    model = tiny(name)
    with pytest.raises(ValueError, match="only supported for models with only full attention layers"):
        QuantizedCache("fp8" if hasattr(tf.cache_utils, "Fp8QuantizedLayer") else "quanto", model.config)
    assert any(layer.compressed for layer in fibkv.Cache(model).report().layers)


@pytest.mark.parametrize("profile", CODECS)
def test_late_large_values_keep_their_size(profile: str) -> None:
    """A scale frozen on the first tokens clips what comes later (448 times its unit at most, in e4m3)."""
    cache = cache_for(tiny("Llama"), profile=profile)
    generator = torch.Generator().manual_seed(0)
    early, late = (torch.randn(1, 2, 40, 16, generator=generator) * size for size in (0.01, 1000.0))
    cache.update(early, early, 0)
    cache.update(late, late, 0)
    key, value = cache.update(late[:, :, :1], late[:, :, :1], 0)
    error = {"int8": 0.01, "fp8": 0.04, "fib4": 0.13, "fib2": 0.4}[profile]
    for read in (key + 0, value + 0):
        for span, exact in ((slice(0, 40), early), (slice(40, 80), late)):
            relative = (read[:, :, span] - exact).norm() / exact.norm()
            assert relative < error


def test_beams_reorder_between_two_seals() -> None:
    """The logits after a reorder are those of the rows that were chosen, sealed or not."""
    model = tiny("Llama")
    order = torch.tensor([2, 2, 0])
    chunks = [ids(3, 40), *(ids(3, 1, seed=seed) for seed in range(12))]
    dense, cache = dequantized_cache(model, "int8"), cache_for(model, profile="int8")
    with fibkv.attention(model):
        for chunk in chunks:
            seen = logits_along(model, [chunk], cache)
            cache.reorder_cache(order)
            model.set_attn_implementation("sdpa")
            expected = logits_along(model, [chunk], dense)
            dense.reorder_cache(order)
            model.set_attn_implementation("fibkv")
            torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(not is_known("Dory"), reason="transformers before 5.24")
@pytest.mark.parametrize(("mode", "layers"), [("per_loop", 8), ("last_loop", 4)])
def test_a_looped_model_finds_the_layers_of_all_passes(mode: str, layers: int) -> None:
    """It would append copies of its own, or read the tensors of layers that have none."""
    model = tiny("Dory", recurrent_kv_cache_mode=mode)
    expected = generate(model, dequantized_cache(model, "fib4"), {"inputs": ids()})
    cache = cache_for(model)
    with fibkv.attention(model):
        assert torch.equal(generate(model, cache, {"inputs": ids()}), expected)
        assert [layer.tokens for layer in cache.report().layers] == [71] * layers
        cache.reset()
        assert torch.equal(generate(model, cache.fork(), {"inputs": ids()}), expected)
