"""Tables: what a kernel needs beside the codes to encode, decode and attend. Made by codecs, frozen.

A table carries no bytes per token; it is shared by all pages of all layers that use the same codec.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fibkv.decision_table import DecisionTable
from fibkv.packing import packed_nbytes
from fibkv.rotation import Rotation
from fibkv.trellis import Trellis
from fibkv.word_rotation import WordRotation


@dataclass(frozen=True, slots=True, eq=False)
class RawTables:
    """Of vectors stored as they are: ``dtype`` is the stored one."""

    dtype: torch.dtype
    head_dim: int

    tensors: ClassVar[tuple[Tensor, ...]] = ()
    rotation: ClassVar[None] = None


@lru_cache(maxsize=64)
def raw_tables(dtype: torch.dtype, head_dim: int) -> RawTables:
    """Tables of tensors that are no codec's: the tail. One object for each pair: kernels know it again by that."""
    return RawTables(dtype=dtype, head_dim=head_dim)


@dataclass(frozen=True, slots=True, eq=False)
class ScaledTables:
    """Of 8-bit numbers with one scale per vector: ``dtype`` is int8 or float8_e4m3fn, ``limit`` its largest value."""

    dtype: torch.dtype
    limit: float
    head_dim: int

    tensors: ClassVar[tuple[Tensor, ...]] = ()
    rotation: ClassVar[None] = None


@dataclass(frozen=True, slots=True, eq=False)
class AffineTables:
    """Of numbers of ``bits`` bits on a grid per group: ``group`` channels of a vector, or all tokens of a channel."""

    head_dim: int
    bits: int
    group: int
    per_channel: bool

    tensors: ClassVar[tuple[Tensor, ...]] = ()
    rotation: ClassVar[None] = None

    @property
    def groups(self) -> int:
        """Groups of a vector."""
        return -(-self.head_dim // self.group)


@dataclass(frozen=True, slots=True, eq=False)
class FibTables:
    """Of FibQuant, and of its trellis form.

    Attributes:
        codewords: ``[N, k]`` float32 in units of a vector of norm 1; of a trellis ``[2^L, 1]``, the levels of windows.
        rotation: the orthogonal transform between vectors and their codes' space.
        head_dim: ``d``.
        bits: width of one index, ceil(log2 N).
        norm_format: ``log8`` or ``f16``.
        gain_corrected: whether the stored norm is the norm times the optimal gain <u,q>/<q,q>.
        scales: factors that the encoder tries on the unit vector, 1.0 alone without a scale search.
        decisions: what the encoder looks codewords up in, or None: it finds the nearest one.
        centered: whether the mean of a group is stored once and taken out of its vectors.
        trellis: None = an index of a block names its codeword; else windows of the indices do.
        word_rotation: what the encoder rotates by; None = by `rotation`, in float64.
    """

    codewords: Tensor
    rotation: Rotation
    head_dim: int
    bits: int
    norm_format: Literal["f16", "log8"]
    gain_corrected: bool
    scales: tuple[float, ...] = (1.0,)
    decisions: DecisionTable | None = None
    centered: bool = False
    trellis: Trellis | None = None
    word_rotation: WordRotation | None = None

    @property
    def num_blocks(self) -> int:
        """Blocks per vector, d / k."""
        return self.head_dim // self.codewords.shape[1]

    @property
    def code_nbytes(self) -> int:
        """Bytes of a vector's indices."""
        return packed_nbytes(self.num_blocks, self.bits)

    @property
    def window(self) -> int:
        """Bits that name a codeword, the index being the newest of them."""
        return self.bits if self.trellis is None else self.trellis.code.window_bits

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What takes memory; tables of other codecs may share some of it."""
        looked_up = () if self.decisions is None else (self.decisions.cells,)
        paths = () if self.trellis is None else (self.trellis.labels,)
        return self.codewords, self.rotation.matrix, *looked_up, *paths


@dataclass(frozen=True, slots=True, eq=False)
class KltTables:
    """Of pairs of coordinates with a static number of bits each, head by head. ``m`` = d / 2 pairs.

    Attributes:
        head_dim: ``d``.
        bits: ``[H, m]`` uint8, of the pairs of each head; not rising. With one head, all vectors are of it.
        weights: ``[H, m]`` float32, of the errors in a pair; the encoder's alone.
        codewords: ``[341, 2]`` float32, of variance 1 per coordinate: of 0 bits, of 2, 4, 6 and 8 bits, from
            `start_of` on.
        scales: factors that the encoder tries on the vector, 1.0 alone without a scale search.
    """

    head_dim: int
    bits: Tensor
    weights: Tensor
    codewords: Tensor
    scales: tuple[float, ...]

    rotation: ClassVar[None] = None
    norm_format: ClassVar[Literal["log8"]] = "log8"
    centered: ClassVar[bool] = False

    @property
    def heads(self) -> int:
        """H."""
        return len(self.bits)

    @property
    def code_nbytes(self) -> int:
        """Bytes of a vector's indices, in every head."""
        return packed_nbytes(int(self.bits[0].sum()), 1)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What takes memory."""
        return self.bits, self.weights, self.codewords


@dataclass(frozen=True, slots=True, eq=False)
class ChannelTables:
    """Of vectors divided by per-channel scales before the ``inner`` codec sees them.

    The query is scaled and rotated page by page, since every group has scales of its own: ``rotation`` is None.
    """

    inner: RawTables | ScaledTables | FibTables

    rotation: ClassVar[None] = None

    @property
    def head_dim(self) -> int:
        """``d`` of the inner codec."""
        return self.inner.head_dim

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the inner tables."""
        return self.inner.tensors


PlainTables = RawTables | ScaledTables | AffineTables | FibTables
Tables = PlainTables | KltTables | ChannelTables


def start_of(bits: int) -> int:
    """Where the codewords of so many bits a pair begin in `KltTables.codewords`: behind 1 + 4 + ... of fewer bits."""
    return ((1 << bits) - 1) // 3


def trellis_of(tables: Tables) -> Trellis | None:
    """The trellis that these tables' indices are read through, or None."""
    inner = tables.inner if isinstance(tables, ChannelTables) else tables
    return inner.trellis if isinstance(inner, FibTables) else None
