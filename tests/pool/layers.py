"""Caches of single layers on a pool's ladder, without a model."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from fibkv.cache import LayerCache
from fibkv.ladder import Rung
from fibkv.packed import Packed
from fibkv.pool import Pool
from fibkv.quarantine import Quarantine
from fibkv.sealing import LayerSettings
from tests.pages.helpers import DIM, HEADS, gaussian, layer_settings

CODECS: dict[Rung, str] = {"fp16": "raw", "q8": "int8", "q4": "fib4", "q2": "fib2"}


@cache
def rungs(implementation: str = "auto") -> dict[Rung, LayerSettings]:
    """Settings of a layer at each rung: pages of 16 tokens, nothing protected."""
    return {
        rung: replace(layer_settings(name, name, implementation=implementation), rung=rung)
        for rung, name in CODECS.items()
    }


def layer_in(pool: Pool, rung: Rung = "fp16", *, batch: int = 1, implementation: str = "auto") -> LayerCache:
    """An empty layer that seals at a rung."""
    like = torch.empty(batch, HEADS, 0, DIM)
    made = rungs(implementation)
    return LayerCache(made[rung], like, like, Quarantine(), pool.inventory, made)


def tokens(count: int, seed: int = 0, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Keys and values ``[batch, H, count, d]``."""
    return gaussian(batch, HEADS, count, DIM, seed=seed), gaussian(batch, HEADS, count, DIM, seed=seed + 1)


def rung_of(pool: Pool, layer: LayerCache) -> list[Rung | None]:
    """Rungs of the pages of row 0, in the order of tokens."""
    entries = [pool.inventory.entry(page) for page in layer.rows[0]]
    return [None if entry is None else entry.rung for entry in entries]


def bytes_held(*layers: LayerCache) -> int:
    """Bytes of tensors behind pages and tails, by looking at the tensors themselves; shared ones once."""
    found: dict[int, int] = {}
    for layer in layers:
        for tensor in (layer.tail.keys, layer.tail.values):
            found[id(tensor)] = tensor.nbytes
        for page in layer.pages():
            for segment in (*page.keys, *page.values):
                held = segment.held
                if isinstance(held, Packed):
                    found[held.address] = held.data.nbytes
                else:
                    found |= {id(tensor): tensor.nbytes for _, tensor in held.named()}
    return sum(found.values())
