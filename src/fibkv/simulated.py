"""Other people's quantizers as caches for evaluation: encoded, decoded at once, and kept dense, their bits counted.

Such a cache saves no memory. It reads every key and value through its quantizer, keeps the same sinks and newest
tokens raw as fibkv's caches do, and seals at the same lengths, so that figures beside one another differ by the
quantizer alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from fibkv.errors import ModelError
from fibkv.regions import ProtectedRegions
from fibkv.report import CacheReport, LayerReport
from fibkv.shape import Role

PAGE_TOKENS = 64
"""Tokens that are quantized at a time once they are full: two groups of 32."""
_FLOAT16_MAX = torch.finfo(torch.float16).max


class Quantizer(Protocol):
    """Encodes and decodes."""

    def __call__(self, rows: Tensor, role: Role) -> tuple[Tensor, int]:
        """What ``rows [B, H, T, d]`` decode to, in their dtype, and the bytes of their codes."""


def affine(rows: Tensor, bits: int, group: int, dim: int) -> tuple[Tensor, int]:
    """Round to nearest on a grid from a group's minimum to its maximum, both ends kept as a float16 scale and zero.

    Args:
        rows: any shape.
        bits: per element.
        group: elements along ``dim`` that share a scale and a zero; the last group may be shorter.
        dim: -1 for groups inside a token, -2 for groups of tokens, one per channel.

    Returns:
        The decoded rows in their dtype, and the bytes of codes, scales and zeros.
    """
    decoded, nbytes = [], 0
    for part in rows.to(torch.float32).split(group, dim):
        low = part.amin(dim, keepdim=True).half().float()
        scale = ((part.amax(dim, keepdim=True) - low) / (2**bits - 1)).clamp(max=_FLOAT16_MAX).half().float()
        # A group of equal elements has scale 0: its zero says it all.
        codes = ((part - low) / scale.where(scale > 0, 1.0)).round().clamp(0, 2**bits - 1)
        decoded.append(codes * scale + low)
        nbytes += (part.numel() * bits + 7) // 8 + 4 * low.numel()
    return torch.cat(decoded, dim).to(rows.dtype), nbytes


class Kivi:
    """KIVI (arXiv 2402.02750): keys per channel in groups of tokens, values per token in groups of channels."""

    def __init__(self, bits: int, group: int = 32) -> None:
        self._bits = bits
        self._group = group

    def __call__(self, rows: Tensor, role: Role) -> tuple[Tensor, int]:
        """See `Quantizer`."""
        return affine(rows, self._bits, self._group, -2 if role == "key" else -1)


class PerToken:
    """Groups of channels inside each token, keys and values alike."""

    def __init__(self, bits: int, group: int = 64) -> None:
        self._bits = bits
        self._group = group

    def __call__(self, rows: Tensor, role: Role) -> tuple[Tensor, int]:  # noqa: ARG002 - both roles alike
        """See `Quantizer`."""
        return affine(rows, self._bits, self._group, -1)


class SimulatedLayer(DynamicLayer):
    """One layer: dense keys and values, of which the first ``sealed`` tokens went through the quantizer."""

    def __init__(self, quantizer: Quantizer, protected: ProtectedRegions, read_through: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._quantizer = quantizer
        self._protected = protected
        self._read_through = read_through
        self.sealed = 0
        self.coded_nbytes = 0
        self.coded_tokens = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds tokens; returns what attention reads: the new ones exactly, or through the codec too."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        # What attention reads of this step must not change behind its back.
        self.keys, self.values = self._seal(keys.clone(), values.clone())
        return (self.keys, self.values) if self._read_through else (keys, values)

    def _seal(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As `fibkv.sealing.full_spans`: full pages, and with read-through a short one at the end."""
        due = keys.shape[-2] - self.sealed - self._protected.last_tokens_raw
        stop = due if self._read_through else due - due % PAGE_TOKENS
        for start in range(self.sealed, self.sealed + stop, PAGE_TOKENS):
            first = max(start, self._protected.first_tokens_raw)
            span = slice(first, min(start + PAGE_TOKENS, self.sealed + stop))
            if span.start >= span.stop:
                continue
            self.coded_tokens += span.stop - span.start
            sides: tuple[tuple[Role, Tensor], ...] = (("key", keys), ("value", values))
            for role, held in sides:
                decoded, nbytes = self._quantizer(held[:, :, span], role)
                held[:, :, span] = decoded
                self.coded_nbytes += nbytes
        self.sealed += max(stop, 0)
        return keys, values

    def report(self, index: int) -> LayerReport:
        """What a real cache of this quantizer would hold."""
        tokens = self.get_seq_length()
        held = [side for side in (self.keys, self.values) if side is not None and tokens]
        per_token = sum(t.shape[0] * t.shape[1] * t.shape[3] for t in held)
        raw_elements = (tokens - self.coded_tokens) * per_token
        raw_nbytes = raw_elements * max((t.element_size() for t in held), default=0)
        return LayerReport(
            layer=index,
            kind=type(self).__name__,
            compressed=True,
            reason="simulated: decoded at once and kept dense, bytes as they would be",
            tokens=tokens,
            pages=-(-self.sealed // PAGE_TOKENS),
            elements=tokens * per_token,
            nbytes=self.coded_nbytes + raw_nbytes,
            tail_tokens=tokens - self.sealed,
            raw_elements=raw_elements,
            raw_nbytes=raw_nbytes,
        )


class SimulatedCache(DynamicCache):
    """A cache of `SimulatedLayer`s, for models whose layers are all of full attention.

    Args:
        layers: of the model.
        quantizer: of keys and values.
        protected: sinks and newest tokens that stay raw; layers and heads are not looked at.
        read_through: see `fibkv.sealing.LayerSettings`.
    """

    def __init__(self, layers: int, quantizer: Quantizer, protected: ProtectedRegions, *, read_through: bool) -> None:
        super().__init__()
        self.simulated = [SimulatedLayer(quantizer, protected, read_through) for _ in range(layers)]
        self.layers = list(self.simulated)
        self.layer_class_to_replicate = None

    def report(self) -> CacheReport:
        """Bytes counted as `fibkv.Cache.report` counts them; such quantizers have no tables."""
        return CacheReport(
            layers=tuple(layer.report(index) for index, layer in enumerate(self.simulated)), tables_nbytes=0
        )

    @contextmanager
    def corrupt_page(self, *, layer: int, row: int, page: int) -> Iterator[None]:
        """For poison tests: the decoded keys of one page in reverse token order while the context lasts."""
        held = self.simulated[layer].keys
        if held is None:
            raise ModelError(f"layer {layer}: expected a filled layer, got an empty one")
        keys = held[row, :, page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS]
        keys.copy_(keys.flip(1))
        try:
            yield
        finally:
            keys.copy_(keys.flip(1))
