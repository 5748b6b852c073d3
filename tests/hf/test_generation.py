"""Generation on pages in depth, on few models; `test_architectures.py` has all of them."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import fibkv
from fibkv.handle import Handle
from fibkv.hf_argument import with_cache
from fibkv.regions import ProtectedRegions
from tests.hf.architectures import tiny
from tests.hf.models import build, prompt

POLICY = fibkv.Policy.per_token(ProtectedRegions(first_tokens_raw=4, last_tokens_raw=8))


def cache_for(model: tf.PreTrainedModel, profile: str = "fib4", implementation: str = "reference") -> fibkv.Cache:
    """Tokens are compared with those of a dense cache, so the kernels are the reference ones."""
    return fibkv.Cache(model, profile=profile, tokens_per_page=16, policy=POLICY, implementation=implementation)


def generate(model: tf.PreTrainedModel, ids: Tensor, cache: object, **options: object) -> Tensor:
    defaults = {"max_new_tokens": 24, "do_sample": False}
    return model.generate(ids, **with_cache(cache), **{**defaults, **options})


def requests() -> list[tuple[Tensor, Tensor | None]]:
    """A single prompt, and a batch of two of which one is left-padded."""
    padded = torch.ones(2, 100, dtype=torch.long)
    padded[1, :37] = 0
    return [(prompt(), None), (prompt(2) * padded, padded)]


def dense_float32_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: object
) -> tuple[Tensor, None]:
    """Attention on the dequantized dense cache in float32, rounded once: what pages compute, made the plain way."""
    if not isinstance(key, Handle):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    key, value = key.source.view.decode(torch.float32)
    out, _ = sdpa_attention_forward(module, query.float(), key, value, attention_mask, **kwargs)
    return out.to(query.dtype), None


tf.AttentionInterface.register("dense_float32", dense_float32_attention)
AttentionMaskInterface.register("dense_float32", sdpa_mask)


def assert_equal_up_to_a_tie(actual: Tensor, expected: Tensor, logits: Tensor) -> None:
    """Rows ``[B, T]`` go apart, if at all, where two of ``logits [B, new, V]`` are as good as equal in bfloat16."""
    prompt_tokens = expected.shape[1] - logits.shape[1]
    for row, different in enumerate(actual != expected):
        if different.any():
            first = int(different.nonzero()[0])
            here = logits[row, first - prompt_tokens]
            lead = here[expected[row, first]] - here[actual[row, first]]
            assert lead <= 2**-7 * here.abs().max(), f"row {row}, token {first}: {lead} ahead"


@pytest.mark.parametrize("name", ["GPT2", "GPTNeoX", "Gemma", "Llama", "Phi3", "Qwen3"])
def test_greedy_in_bfloat16(name: str) -> None:
    """In bfloat16 a last-bit difference in rounding decides near-ties of random weights.

    So tokens are compared with a dense attention that rounds where attention on pages rounds, up to the first such tie
    if there is any, and the logits with those of transformers' own attention on the dense cache, along the same tokens,
    within bfloat16's rounding.
    """
    model = tiny(name, torch.bfloat16)
    for ids, mask in requests():
        model.set_attn_implementation("dense_float32")
        kept = {"output_logits": True, "return_dict_in_generate": True}
        dense = generate(model, ids, cache_for(model), attention_mask=mask, **kept)
        expected = dense.sequences
        model.set_attn_implementation("sdpa")
        paged = cache_for(model)
        with fibkv.attention(model):
            actual = generate(model, ids, paged, attention_mask=mask)
        assert_equal_up_to_a_tie(actual, expected, torch.stack(dense.logits, 1).float())
        assert paged.report().materialized == 0
    chunks = expected[:1, :116].split([100] + [1] * 16, 1)
    with torch.no_grad():
        dense_cache, paged_cache = cache_for(model), cache_for(model)
        dense = [model(chunk, **with_cache(dense_cache)).logits[:, -1] for chunk in chunks]
        with fibkv.attention(model):
            pages = [model(chunk, **with_cache(paged_cache)).logits[:, -1] for chunk in chunks]
    difference = (torch.cat(pages) - torch.cat(dense)).float()
    assert difference.square().mean().sqrt() < 0.03 * torch.cat(dense).float().std()


def test_the_comparison_can_fail() -> None:
    """At 1 bit the tokens differ from those of the exact cache: equality above is not trivial."""
    model = build("llama")
    exact = generate(model, prompt(), tf.DynamicCache(config=model.config))
    with fibkv.attention(model):
        coarse = generate(model, prompt(), cache_for(model, "fib1"))
        raw = generate(model, prompt(), cache_for(model, "raw"))
    assert not torch.equal(coarse, exact)
    assert torch.equal(raw, exact)


def test_left_padding_does_not_change_a_row() -> None:
    """With raw pages: a padded row gives the tokens that it gives alone."""
    model = build("llama")
    alone = prompt(1, 63, seed=3)
    padded = torch.cat([torch.zeros(1, 37, dtype=torch.long), alone], 1)
    both = torch.cat([prompt(), padded])
    with fibkv.attention(model):
        expected = generate(model, alone, cache_for(model, "raw"))[0, 63:]
        mask = (both != 0).long()
        actual = generate(model, both, cache_for(model, "raw"), attention_mask=mask)[1, 100:]
    assert torch.equal(actual, expected)


class _LargestTensor(TorchDispatchMode):
    """Records the most bytes of any tensor, of any dtype, that an operation makes."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.nbytes = max(self.nbytes, tensor.nbytes)
        return result


def _largest_in_a_step(model: tf.PreTrainedModel, tokens: int, context: object) -> int:
    cache = fibkv.Cache(model, profile="fib4")
    with torch.no_grad(), context(model):
        for chunk in prompt(1, tokens).split(2048, 1):
            model(chunk, **with_cache(cache), logits_to_keep=1)
        with _LargestTensor() as largest:
            model(prompt(1, 1), **with_cache(cache), logits_to_keep=1)
    return largest.nbytes


def test_a_decode_step_makes_no_tensor_that_grows_with_the_context() -> None:
    model = build("llama")
    short, long = (_largest_in_a_step(model, tokens, fibkv.attention) for tokens in (2048, 6144))
    assert long <= short
    # A tile of 1024 tokens, 2 KV heads and head_dim 32 in float32 is the largest; all keys of a layer would be 1.5 MiB.
    assert long <= 1024 * 2 * 32 * 4


def test_prefill_is_exact_and_later_chunks_read_the_past_as_stored() -> None:
    model = build("llama")
    ids = prompt(1, 120)
    with torch.no_grad(), fibkv.attention(model):
        exact = model(ids).logits
        cache = cache_for(model)
        first = model(ids[:, :80], **with_cache(cache)).logits
        second = model(ids[:, 80:], **with_cache(cache)).logits
    torch.testing.assert_close(first, exact[:, :80], rtol=1e-4, atol=1e-4)
    moved = (second - exact[:, 80:]).abs().max()
    assert moved > 1e-3
    with torch.no_grad():
        dense = cache_for(model)
        model(ids[:, :80], **with_cache(dense))
        expected = model(ids[:, 80:], **with_cache(dense)).logits
    torch.testing.assert_close(second, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_chunked_prefill_and_a_second_turn() -> None:
    model = build("qwen2")
    expected_cache, cache = cache_for(model), cache_for(model)
    expected = generate(model, prompt(), expected_cache, prefill_chunk_size=33)
    with fibkv.attention(model):
        actual = generate(model, prompt(), cache, prefill_chunk_size=33)
    assert torch.equal(actual, expected)
    turn = torch.cat([actual, prompt(1, 20, seed=9)], 1)
    expected = generate(model, turn, expected_cache)
    with fibkv.attention(model):
        assert torch.equal(generate(model, turn, cache), expected)
    assert cache.report().materialized == 0


def test_beams() -> None:
    model = build("llama")
    expected = generate(model, prompt(2), cache_for(model), num_beams=3)
    with fibkv.attention(model):
        cache = cache_for(model)
        actual = generate(model, prompt(2), cache, num_beams=3)
    assert torch.equal(actual, expected)
    assert cache.report().materialized == 0


def test_sampling() -> None:
    model = build("llama")
    options = {"do_sample": True, "temperature": 1.5, "num_return_sequences": 3}
    torch.manual_seed(7)
    expected = generate(model, prompt(), cache_for(model), **options)
    with fibkv.attention(model):
        torch.manual_seed(7)
        assert torch.equal(generate(model, prompt(), cache_for(model), **options), expected)
    assert len(set(map(tuple, expected.tolist()))) == 3


def test_prompt_lookup_decoding_crops_the_cache() -> None:
    model = build("llama")
    ids = prompt(1, 20).repeat(1, 5)
    plain = generate(model, ids, cache_for(model, "raw"))
    with fibkv.attention(model):
        cache = cache_for(model, "raw")
        assert torch.equal(generate(model, ids, cache, prompt_lookup_num_tokens=4), plain)
        assert cache.get_seq_length() == ids.shape[1] + 23
        coarse = cache_for(model)
        generate(model, ids, coarse, prompt_lookup_num_tokens=4)
    assert coarse.get_seq_length() == ids.shape[1] + 23
    assert coarse.report().materialized == 0


def test_copies_of_a_cache_diverge_and_share_pages() -> None:
    model = build("llama")
    with torch.no_grad(), fibkv.attention(model):
        cache = cache_for(model)
        model(prompt(), **with_cache(cache))
        fork = copy.deepcopy(cache)
        shared = [a is b for a, b in zip(cache.layers[0].store.pages(), fork.layers[0].store.pages(), strict=True)]
        assert all(shared)
        assert len(shared) == 5
        model(prompt(1, 30, seed=4), **with_cache(fork))
        expected = model(prompt(1, 1, seed=5), **with_cache(copy.deepcopy(cache))).logits
        actual = model(prompt(1, 1, seed=5), **with_cache(cache)).logits
    assert torch.equal(actual, expected)


def test_repeat_select_and_reset() -> None:
    model = build("llama")
    with torch.no_grad(), fibkv.attention(model):
        cache = cache_for(model)
        model(prompt(2), **with_cache(cache))
        token = prompt(2, 1, seed=5)
        expected = model(token, **with_cache(copy.deepcopy(cache))).logits
        repeated = copy.deepcopy(cache)
        repeated.batch_repeat_interleave(3)
        actual = model(token.repeat_interleave(3, 0), **with_cache(repeated)).logits
        torch.testing.assert_close(actual, expected.repeat_interleave(3, 0), rtol=1e-4, atol=1e-3)
        cache.batch_select_indices(torch.tensor([1]))
        torch.testing.assert_close(model(token[1:], **with_cache(cache)).logits, expected[1:], rtol=1e-4, atol=1e-3)
        cache.reset()
        assert cache.get_seq_length() == 0
        model(prompt(2), **with_cache(cache))
        assert cache.get_seq_length() == 100


def test_poison() -> None:
    """Damage one page in memory and the logits change; restore it and they are exactly what they were."""
    model = build("llama")
    for profile in ("raw", "int8", "fp8", "fib4", "fib2"):
        with torch.no_grad(), fibkv.attention(model):
            cache = cache_for(model, profile)
            model(prompt(), **with_cache(cache))

            def logits(held: fibkv.Cache = cache) -> Tensor:
                return model(prompt(1, 1, seed=5), **with_cache(copy.deepcopy(held))).logits

            before = logits()
            with cache.corrupt_page(layer=1, row=0, page=2):
                assert not torch.equal(logits(), before), profile
            assert torch.equal(logits(), before), profile


def test_counted_bits_at_8k_tokens() -> None:
    """4-bit FibQuant at d = 128 with 8-bit norms, tail and sinks included: under 4.4."""
    config = tf.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=8192,
    )
    cache = fibkv.Cache(config, bits=4)
    keys = torch.randn(1, 4, 8192, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for layer in range(2):
        cache.update(keys, keys.flip(2), layer)
    report = cache.report()
    assert report.elements == 2 * 2 * 4 * 8192 * 128
    segments = [
        segment for layer in cache.layers for page in layer.store.pages() for segment in (*page.keys, *page.values)
    ]
    held = sum(segment.held.nbytes for segment in segments)
    # An implementation may keep codes in an order of its own, and round up a little.
    canonical = sum(tensor.nbytes for segment in segments for _, tensor in segment.codes.named())
    assert canonical <= held < 1.001 * canonical
    tail = sum(t.numel() * 2 for layer in cache.layers for t in (layer.store.tail.keys, layer.store.tail.values))
    pages = 2 * (8192 - 64) // 64
    assert report.nbytes == held + tail + 64 * pages + report.tables_nbytes + report.slack_nbytes
    assert report.slack_nbytes < 2 * 4096, "what the last grain of each layer's region has behind pages"
    assert 4.0625 < report.bits_per_element < 4.4
