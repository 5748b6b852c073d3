"""Triton: queries taken to the codes' space before attention, and splits merged and taken back after it.

One launch each. Rotations are float32 products with the whole matrix, by blocks of its rows or columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from fibkv.kernels.triton_launch import Kernel, kernel_of
from fibkv.kernels.triton_load import load_floats, store_floats
from fibkv.kernels.triton_sides import FLOATS, FORMS, power_of_two

# What a matrix unit takes at least: queries of a program; and splits that one reads at a time.
BLOCK = 16
# Columns of a matrix that a program multiplies by: few, since products of float32 numbers take their time.
COLUMNS = 16
# Queries up to which each reads a matrix of its own.
FEW = 256


@triton.jit(do_not_specialize=["count"])
def _turn(
    query,
    rotation,
    plain,
    turned,
    count,
    FORM: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``query [count, DIM]`` of FORM as ``plain`` float32, and rotated by ``rotation [DIM, DIM]`` as ``turned``."""
    queries = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    used = (queries < count)[:, None]
    axis, columns = tl.arange(0, D), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    numbers = load_floats(query, queries[:, None] * DIM + axis[None, :], used & (axis < DIM)[None, :], FORM)
    inside = (columns < DIM)[:, None] & (axis < DIM)[None, :]
    rows = tl.load(rotation + columns[:, None] * DIM + axis[None, :], inside, other=0.0)
    places = queries[:, None] * DIM + columns[None, :]
    wanted = used & (columns < DIM)[None, :]
    tl.store(turned + places, tl.dot(numbers, tl.trans(rows), input_precision="ieee"), wanted)
    tl.store(plain + places, load_floats(query, places, wanted, FORM), wanted)


@dataclass(frozen=True, eq=False)
class Turn:
    """Takes queries of one dtype to the space of codes.

    Attributes:
        kernel: `_turn`, with its constants.
        rotation: ``[d, d]`` float32, on the queries' device.
    """

    kernel: Kernel
    rotation: Tensor

    @classmethod
    def of(cls, dtype: torch.dtype, rotation: Tensor) -> Self:
        """For queries of a dtype of `triton_sides.FLOATS`."""
        dim = len(rotation)
        constants = {"FORM": FORMS[dtype], "DIM": dim, "D": _width(dim), "QUERIES": BLOCK, "COLUMNS": COLUMNS}
        return cls(kernel_of(_turn, rotation.device, constants), rotation)

    def __call__(self, query: Tensor, stream: int) -> tuple[Tensor, Tensor]:
        """Queries ``[..., d]``, contiguous: the same in float32, and turned."""
        shape = query.shape
        plain = torch.empty(shape, dtype=torch.float32, device=query.device)
        turned = torch.empty_like(plain)
        dim, count = shape[-1], shape[:-1].numel()
        grid = _ceil(count, BLOCK), _ceil(dim, COLUMNS), 1
        self.kernel.launch(grid, stream, (query.view(torch.uint8), self.rotation, plain, turned), (count,))
        return plain, turned


@triton.jit
def _sum(starts, shares, chosen, columns, DIM: tl.constexpr):
    """``[COLUMNS]`` float32: columns of the chosen rows that begin at ``starts [SLOTS]``, times their shares."""
    wanted = chosen[:, None] & (columns < DIM)[None, :]
    return tl.sum(tl.load(starts[:, None] + columns[None, :], wanted, other=0.0) * shares[:, None], 0)


@triton.jit(do_not_specialize=["count", "first", "stop", "plain", "end", "slots"])
def merge_splits(
    outs,
    lses,
    rotation,
    out,
    lse,
    count,
    first,
    stop,
    plain,
    end,
    slots,
    ROTATED: tl.constexpr,
    PLAIN: tl.constexpr,
    ADDED: tl.constexpr,
    FORM: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The share of splits ``first:stop`` and ``plain:end`` in attention over all ``slots`` splits, by log-sum-exp.

    Grid: (queries, blocks of COLUMNS coordinates).

    Args:
        outs: ``[slots, count, DIM]`` float32; undefined where lses are -inf.
        lses: ``[slots, count]`` float32.
        rotation: ``[DIM, DIM]`` float32, from whose space outputs are taken back (if ROTATED).
        out: ``[count, DIM]`` of FORM, to which the share is added (if ADDED); 0 for queries that see nothing.
        lse: ``[count]`` float32, of all splits.
        count: queries.
        first: of the splits that are in that space (if ROTATED).
        stop: behind the last of them.
        plain: the first of those that are added as they are (if PLAIN).
        end: behind the last of them.
        slots: how many there are.
    """
    query = tl.program_id(0).to(tl.int64)
    peak = tl.full([SLOTS], float("-inf"), tl.float32)
    for begin in range(0, slots, SLOTS):
        slot = begin + tl.arange(0, SLOTS)
        peak = tl.maximum(peak, tl.load(lses + slot * count + query, slot < slots, other=float("-inf")))
    top = tl.max(peak, 0)
    level = tl.where(top == float("-inf"), 0.0, top)
    axis, columns = tl.arange(0, D), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([SLOTS], tl.float32)
    turned = tl.zeros([D], tl.float32)
    sums = tl.zeros([COLUMNS], tl.float32)
    for begin in range(0, slots, SLOTS):
        slot = begin + tl.arange(0, SLOTS)
        shares = tl.exp(tl.load(lses + slot * count + query, slot < slots, other=float("-inf")) - level)
        total += shares
        if ROTATED:
            chosen = (slot >= first) & (slot < stop) & (shares > 0.0)
            turned += _sum(outs + (slot * count + query) * DIM, shares, chosen, axis, DIM)
        if PLAIN:
            chosen = (slot >= plain) & (slot < end) & (shares > 0.0)
            sums += _sum(outs + (slot * count + query) * DIM, shares, chosen, columns, DIM)
    whole = tl.sum(total, 0)
    divisor = tl.where(whole > 0.0, whole, 1.0)
    share = sums / divisor
    if ROTATED:
        inside = (axis < DIM)[:, None] & (columns < DIM)[None, :]
        matrix = tl.load(rotation + axis[:, None] * DIM + columns[None, :], inside, other=0.0)
        share += tl.sum((turned / divisor)[:, None] * matrix, 0)
    into = query * DIM + columns
    if ADDED:
        share += load_floats(out, into, columns < DIM, FORM)
    store_floats(out, into, share, columns < DIM, FORM)
    tl.store(lse + query, top + tl.log(divisor))


class Space(NamedTuple):
    """Splits whose outputs are behind one rotation.

    Attributes:
        first: of them.
        stop: behind the last of them.
        rotation: ``[d, d]`` float32, on their device.
    """

    first: int
    stop: int
    rotation: Tensor


class Merge:
    """Merges splits of queries of one kind, and takes what is behind a rotation back.

    Attributes:
        shape: of the output, ``[..., d]``.
        dtype: of the output: the queries', where one launch makes it of numbers that kernels can write, else float32.
        device: of the splits.
    """

    def __init__(
        self, spaces: Sequence[Space], plain: int | None, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> None:
        """How splits are merged.

        Args:
            spaces: in which splits are.
            plain: from here on to the last one splits are in none of them; None = no split is.
            shape: of the output.
            dtype: of the queries.
            device: of the splits.
        """
        self._spaces, self._plain = spaces, plain
        self._count = shape[:-1].numel()
        is_one = len(spaces) < 2 and self._count <= FEW and dtype in FLOATS
        self.shape, self.dtype, self.device = shape, dtype if is_one else torch.float32, device
        has_plain = plain is not None
        self._rotated = [
            self._kernel(ROTATED=True, PLAIN=has_plain and not index, ADDED=index > 0) for index in range(len(spaces))
        ]
        self._as_it_is = self._kernel(ROTATED=False, PLAIN=True, ADDED=False)

    def _kernel(self, **modes: bool) -> Kernel:
        dim = self.shape[-1]
        # Without a rotation one program has all coordinates.
        columns = COLUMNS if modes["ROTATED"] else _width(dim)
        sizes = {"DIM": dim, "D": _width(dim), "SLOTS": BLOCK, "COLUMNS": columns}
        return kernel_of(merge_splits, self.device, {**modes, "FORM": FORMS[self.dtype], **sizes})

    def __call__(self, outs: Tensor, lses: Tensor, slots: int, stream: int) -> tuple[Tensor, Tensor]:
        """Attention over all splits.

        Args:
            outs: of ``[slots, ..., d]`` float32, undefined where lses are -inf.
            lses: of ``[slots, ...]`` float32.
            slots: splits.
            stream: handle of the device's current one.

        Returns:
            ``out [..., d]`` of `dtype`, and ``lse [...]`` float32.
        """
        lse = torch.empty(self.shape[:-1], dtype=torch.float32, device=self.device)
        if self._count > FEW and self._spaces:
            return self._by_products(outs, lses, lse, slots, stream), lse
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        plain, grid = self._plain or 0, (self._count, _ceil(self.shape[-1], COLUMNS), 1)
        for space, kernel in zip(self._spaces, self._rotated, strict=True):
            tensors = outs, lses, space.rotation, out, lse
            kernel.launch(grid, stream, tensors, (self._count, space.first, space.stop, plain, slots, slots))
        if not self._spaces:
            self._add(outs, lses, (0, slots, slots), out, lse, stream)
        return out, lse

    def _by_products(self, outs: Tensor, lses: Tensor, lse: Tensor, slots: int, stream: int) -> Tensor:
        """The output; one product for all queries reads a matrix once."""
        plain = slots if self._plain is None else self._plain
        total = torch.empty(self.shape, dtype=torch.float32, device=self.device)
        # The splits in no space, if there are none a zero.
        self._add(outs, lses, (plain, slots, slots), total, lse, stream)
        for first, stop, rotation in self._spaces:
            share = torch.empty_like(total)
            self._add(outs, lses, (first, stop, slots), share, lse, stream)
            total += share @ rotation
        return total

    def _add(
        self, outs: Tensor, lses: Tensor, splits: tuple[int, int, int], out: Tensor, lse: Tensor, stream: int
    ) -> None:
        """Writes the share of splits as they are: the first, that behind the last, and how many there are in all."""
        self._as_it_is.launch((self._count, 1, 1), stream, (outs, lses, outs, out, lse), (self._count, 0, 0, *splits))


def _width(dim: int) -> int:
    return max(BLOCK, power_of_two(dim))


def _ceil(number: int, by: int) -> int:
    return -(-number // by)
