"""Codes: what a codec makes of rows of vectors. Tensors only, frozen, in structure-of-arrays form.

Letters used everywhere: ``T`` tokens, ``d`` head_dim, ``k`` block_dim, ``N`` codebook size, and
``...`` for leading axes such as ``[rows, pages, heads]``. Every field starts with the leading axes;
fields with one entry per vector go on with ``T``, the others (*group* fields) hold what the
``T`` vectors of one head share.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Codes(ABC):
    """Base of all codes: walks the fields, so that a new field can be neither forgotten nor miscounted."""

    GROUP_FIELDS: ClassVar[frozenset[str]] = frozenset()

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors in canonical order: the order in which they are hashed and stored."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Codes):
                yield from value.named()
            else:
                yield field.name, value

    @property
    @abstractmethod
    def axes(self) -> torch.Size:
        """The axes ``[..., T]`` of the vectors."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.named())

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(self.named())[1].device

    def canonical(self) -> Self:
        """The codes in canonical order: themselves. (`fibkv.packed.Packed` are codes in another order.)"""
        return self

    def store(self, codes: Self) -> None:
        """Overwrites the tensors, in place, with those of other codes of the same shape."""
        for (_, own), (_, new) in zip(self.named(), codes.named(), strict=True):
            own.copy_(new)

    def to(self, device: torch.device) -> Self:
        """The codes on a device."""
        return self if self.device == device else self.map(lambda tensor: tensor.to(device))

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same codes with ``function`` applied to every tensor (it must keep the meaning of the axes)."""
        return self._rebuild(lambda _, tensor: function(tensor), lambda inner: inner.map(function))

    def tokens(self, start: int, stop: int, *, lead: int) -> Self:
        """The codes of tokens ``start:stop`` of every group, as views; ``lead`` is the number of leading axes."""
        span = (slice(None),) * lead + (slice(start, stop),)
        return self._rebuild(
            lambda name, tensor: tensor if name in self.GROUP_FIELDS else tensor[span],
            lambda inner: inner.tokens(start, stop, lead=lead),
        )

    @classmethod
    def stack(cls, items: Sequence[Self]) -> Self:
        """Codes of equal shape stacked along a new first axis."""
        columns: dict[str, object] = {}
        for field in fields(cls):
            values = [getattr(item, field.name) for item in items]
            first = values[0]
            columns[field.name] = type(first).stack(values) if isinstance(first, Codes) else torch.stack(values)
        return cls(**columns)

    def _rebuild(self, leaf: Callable[[str, Tensor], Tensor], nested: Callable[[Codes], Codes]) -> Self:
        changed = {}
        for field in fields(self):
            value = getattr(self, field.name)
            changed[field.name] = nested(value) if isinstance(value, Codes) else leaf(field.name, value)
        return type(self)(**changed)


@dataclass(frozen=True, slots=True, eq=False)
class RawCodes(Codes):
    """Vectors as they are.

    Attributes:
        values: ``[..., T, d]`` float16, bfloat16 or float32.
    """

    values: Tensor

    @property
    def axes(self) -> torch.Size:
        """``[..., T]``."""
        return self.values.shape[:-1]


@dataclass(frozen=True, slots=True, eq=False)
class ScaledCodes(Codes):
    """8-bit numbers with one scale per vector: vector = values * scale.

    Attributes:
        scales: ``[..., T]`` bfloat16, >= 0 (bfloat16 has float32's range, so no finite vector overflows it).
        values: ``[..., T, d]`` int8 in -127..127, or float8_e4m3fn.
    """

    scales: Tensor
    values: Tensor

    @property
    def axes(self) -> torch.Size:
        """``[..., T]``."""
        return self.scales.shape


@dataclass(frozen=True, slots=True, eq=False)
class AffineCodes(Codes):
    """Whole numbers on grids, per token: element = lowest + number * step of its group of channels.

    Attributes:
        grid: ``[..., T, groups, 2]`` float16, (lowest, step >= 0).
        values: ``[..., T, ceil(d * bits / 8)]`` uint8, little-endian bit stream of the numbers.
    """

    grid: Tensor
    values: Tensor

    @property
    def axes(self) -> torch.Size:
        """``[..., T]``."""
        return self.values.shape[:-1]


@dataclass(frozen=True, slots=True, eq=False)
class AffineChannelCodes(AffineCodes):
    """The same per channel: ``grid [..., d, 2]``, of each channel over the tokens of the group."""

    GROUP_FIELDS: ClassVar[frozenset[str]] = frozenset({"grid"})


@dataclass(frozen=True, slots=True, eq=False)
class FibCodes(Codes):
    """FibQuant: packed codeword indices of the rotated unit vector, and its norm.

    Attributes:
        mean: ``[..., 1 + d]`` int8, (e, m) of a group of centered vectors: each is its code plus m * 2 ** e in the
            rotated space, with m in -127..127; ``[..., 0]`` for vectors that are coded as they are.
        norm_range: ``[..., 2]`` float16, (lowest log2 norm, step) of the group, for 8-bit log norms;
            ``[..., 0]`` for float16 norms.
        norms: ``[..., T]`` uint8 (0 = zero vector, c >= 1 = 2 ** (low + (c - 1) * step)) or float16.
        indices: ``[..., T, ceil(d/k * ceil(log2 N) / 8)]`` uint8, little-endian bit stream of block indices.
    """

    GROUP_FIELDS: ClassVar[frozenset[str]] = frozenset({"mean", "norm_range"})

    mean: Tensor
    norm_range: Tensor
    norms: Tensor
    indices: Tensor

    @property
    def axes(self) -> torch.Size:
        """``[..., T]``."""
        return self.norms.shape


@dataclass(frozen=True, slots=True, eq=False)
class ChannelCodes(Codes):
    """Codes of vectors whose channels were first divided by one scale per channel and group of tokens.

    Attributes:
        channel_scales: ``[..., d]`` bfloat16, >= 0; 0 where the channel is zero in every token of the group.
        inner: codes of vectors / channel_scales.
    """

    GROUP_FIELDS: ClassVar[frozenset[str]] = frozenset({"channel_scales"})

    channel_scales: Tensor
    inner: Codes

    @property
    def axes(self) -> torch.Size:
        """``[..., T]``."""
        return self.inner.axes
