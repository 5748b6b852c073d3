"""A random-weight model, and the caches compared under it: transformers' own, dense and quantized, and fibkv's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, LlamaConfig, QuantizedCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fibkv.bench_contenders import matmul_keys_first
from fibkv.bench_settings import ModelSettings, profile_choice
from fibkv.hf import Cache
from fibkv.hf_attention import ATTENTION_NAME
from fibkv.hf_layer import CompressedLayer
from fibkv.quality import CausalLM

MATMUL_NAME = "fibkv_bench_matmul"
VOCABULARY = 512
"""Tokens: few, since the product with the vocabulary has nothing to do with the cache."""

QUANTIZED: dict[str, dict[str, Any]] = {
    "quanto 4-bit": {"backend": "quanto", "nbits": 4},
    # The axis that transformers recommends for hqq.
    "hqq 4-bit": {"backend": "hqq", "nbits": 4, "axis_key": 1, "axis_value": 1},
    "transformers fp8": {"backend": "fp8"},
}
"""Options of transformers' `QuantizedCache`, by name. They are given the matmul attention, the faster of the dense rows
on most machines."""


@dataclass(frozen=True, slots=True, eq=False)
class CacheContender:
    """One cache under one attention.

    Attributes:
        name: what a reader of the table sees.
        kind: whose cache it is, and how it keeps vectors.
        make: makes an empty cache.
        attention: name in transformers' registry.
    """

    name: str
    kind: Literal["dense", "quantized", "fibkv"]
    make: Callable[[], Any]
    attention: str


def matmul_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: of a single query by `matmul_keys_first`, else by `sdpa`.

    Args:
        module: the attention module.
        query: ``[B, Hq, Q, d]``.
        key: ``[B, H, L, d]``.
        value: ``[B, H, L, d]``.
        attention_mask: None for a single query that sees everything.
        scaling: factor of the logits; default 1/sqrt(d).
        **kwargs: for `sdpa`.

    Returns:
        ``[B, Q, Hq, d]``, and None for the weights.
    """
    if query.shape[2] > 1 or attention_mask is not None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return out, None
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    return matmul_keys_first(query, key, value, scale).transpose(1, 2).contiguous(), None


AttentionInterface.register(MATMUL_NAME, matmul_attention_forward)
AttentionMaskInterface.register(MATMUL_NAME, sdpa_mask)


def random_llama(settings: ModelSettings, positions: int) -> CausalLM:
    """A Llama of random weights in bfloat16, the same for the same seed; ``positions`` is the longest sequence."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=settings.hidden_size,
        intermediate_size=7 * settings.hidden_size // 2,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.query_heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=positions,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()


def cache_contenders(
    model: CausalLM, settings: ModelSettings
) -> tuple[list[CacheContender], tuple[tuple[str, str], ...]]:
    """The caches of a run, transformers' first, and those that cannot be made here, each with the reason."""
    config = model.config
    contenders = [
        CacheContender("DynamicCache sdpa", "dense", lambda: DynamicCache(config=config), "sdpa"),
        CacheContender("DynamicCache matmul", "dense", lambda: DynamicCache(config=config), MATMUL_NAME),
    ]
    skipped = []
    for name, options in QUANTIZED.items():
        # A lambda would see the options of the last turn of the loop.
        def make(options: dict[str, Any] = options) -> Any:
            return QuantizedCache(config=config, **options)

        try:
            make()
        except (ImportError, ValueError) as error:  # not installed, or unknown to an older transformers
            skipped.append((name, str(error).split(". ", 1)[0]))
        else:
            contenders.append(CacheContender(name, "quantized", make, MATMUL_NAME))
    for profile in settings.profiles:

        def make_pages(profile: str = profile) -> Cache:
            return Cache(model, profile=profile_choice(profile), implementation=settings.implementation)

        contenders.append(CacheContender(f"fibkv {profile}", "fibkv", make_pages, ATTENTION_NAME))
    return contenders, tuple(skipped)


@torch.no_grad()
def fill(cache: Any, settings: ModelSettings, tokens: int) -> None:
    """Gives a cache random keys and values through its own update, the same to every cache."""
    shape = (2, 1, settings.kv_heads, tokens, settings.head_dim)
    for layer in range(settings.layers):
        generator = torch.Generator().manual_seed(settings.seed * settings.layers + layer)
        keys, values = torch.randn(shape, generator=generator).bfloat16()
        cache.update(keys, values, layer)


@torch.no_grad()
def dense_copy(cache: Cache, model: CausalLM) -> DynamicCache:
    """A dense cache of the values that a compressed one stands for, decoded by the reference kernels."""
    dense = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        assert isinstance(layer, CompressedLayer)
        assert layer.store is not None
        dense.update(*layer.store.view().decode(torch.bfloat16, implementation="reference"), index)
    return dense


def held_nbytes(cache: Any) -> int:
    """Bytes that a cache holds: a compressed one's counted bytes, else the memory behind every tensor of its layers."""
    if isinstance(cache, Cache):
        return cache.report().nbytes
    return held_tensors_nbytes([vars(layer) for layer in cache.layers])


def held_tensors_nbytes(held: Any) -> int:
    """Bytes of the memory behind every tensor in nested containers."""
    storages: dict[int, int] = {}
    _collect(held, storages)
    return sum(storages.values())


def _collect(held: Any, storages: dict[int, int]) -> None:
    """Notes the storage of every tensor in nested containers; a tensor that wraps others counts as those."""
    if isinstance(held, Tensor):
        if hasattr(held, "__tensor_flatten__"):
            names, _ = held.__tensor_flatten__()
            _collect([getattr(held, name) for name in names], storages)
        else:
            storage = held.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    elif isinstance(held, dict):
        _collect(list(held.values()), storages)
    elif isinstance(held, list | tuple):
        for item in held:
            _collect(item, storages)
