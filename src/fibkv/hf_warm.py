"""Everything that a device compiles and loads on first use, done before the first prompt."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from fibkv.hf_argument import with_cache
from fibkv.hf_layer import CompressedLayer

# Lengths of steps: kernels are made for so many queries at a time, in powers of two, and for no more.
STEPS = (1, 1, 2, 4, 8, 16, 32, 64)


def warm_up(model: PreTrainedModel, cache: Cache, rows: int) -> None:
    """Runs a model over copies of a cache; see `fibkv.Cache.warm_up`."""
    if not any(isinstance(layer, CompressedLayer) for layer in cache.layers):
        return
    for is_padded in (False, True) if rows > 1 else (False,):
        scratch = copy.deepcopy(cache)
        scratch.reset()
        _run_through(model, scratch, rows, is_padded=is_padded)


@torch.no_grad()
def _run_through(model: PreTrainedModel, cache: Cache, rows: int, *, is_padded: bool) -> None:
    """A prompt, a chunk behind it that fills pages, a step that seals one, and steps that read them.

    Args:
        model: to run.
        cache: empty, with at least one compressed layer; filled with what is of no use.
        rows: of the batch.
        is_padded: whether one row begins with padding.
    """
    past = 0
    for tokens in _lengths(cache.layers):
        ids = torch.zeros(rows, tokens, dtype=torch.long, device=model.device)
        mask = torch.ones(rows, past + tokens, dtype=torch.long, device=model.device)
        mask[0, 0] = not is_padded
        masked: dict[str, Any] = {"attention_mask": mask} if is_padded else {}
        model(input_ids=ids, **with_cache(cache), **masked)
        past += tokens
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _lengths(layers: list[Any]) -> Iterator[int]:
    first = next(layer for layer in layers if isinstance(layer, CompressedLayer))
    page = first.settings.tokens_per_page
    yield page
    assert first.store is not None
    # All but the last token of a third page are there then, which the first step brings.
    yield 2 * page + first.store.settings.last_tokens_raw - 1
    yield from STEPS
