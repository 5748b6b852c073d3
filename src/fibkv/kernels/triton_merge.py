"""Triton: queries taken to the codes' space before attention, and splits merged and taken back after it.

One launch each. Rotations are float32 products with the whole matrix, by blocks of its rows or columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fibkv.kernels.triton_load import load_floats
from fibkv.kernels.triton_sides import FORMS, octets, power_of_two

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


def turn(query: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Queries ``[..., d]`` of a floating dtype: the same in float32, and rotated by ``rotation [d, d]``."""
    query = query.contiguous()
    plain = torch.empty(query.shape, device=query.device)
    turned = torch.empty_like(plain)
    dim, count = query.shape[-1], query.shape[:-1].numel()
    _turn[(_ceil(count, BLOCK), _ceil(dim, COLUMNS))](
        octets(query),
        rotation,
        plain,
        turned,
        count,
        FORM=FORMS[query.dtype],
        DIM=dim,
        D=max(BLOCK, power_of_two(dim)),
        QUERIES=BLOCK,
        COLUMNS=COLUMNS,
        enable_fp_fusion=True,
    )
    return plain, turned


@triton.jit(do_not_specialize=["count", "first", "stop", "slots"])
def merge_splits(
    outs,
    lses,
    rotation,
    out,
    lse,
    count,
    first,
    stop,
    slots,
    ROTATED: tl.constexpr,
    ADDED: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The share of splits ``first:stop`` in attention over all ``slots`` splits, by log-sum-exp.

    Grid: (queries, blocks of COLUMNS coordinates).

    Args:
        outs: ``[slots, count, DIM]`` float32; undefined where lses are -inf.
        lses: ``[slots, count]`` float32.
        rotation: ``[DIM, DIM]`` float32, from whose space outputs are taken back (if ROTATED).
        out: ``[count, DIM]`` float32, to which the share is added (if ADDED); 0 for queries that see nothing.
        lse: ``[count]`` float32, of all splits.
        count: queries.
        first: of the splits that are added up.
        stop: behind the last of them.
        slots: how many there are.
    """
    query = tl.program_id(0).to(tl.int64)
    peak = tl.full([SLOTS], float("-inf"), tl.float32)
    for begin in range(0, slots, SLOTS):
        slot = begin + tl.arange(0, SLOTS)
        peak = tl.maximum(peak, tl.load(lses + slot * count + query, slot < slots, other=float("-inf")))
    top = tl.max(peak, 0)
    level = tl.where(top == float("-inf"), 0.0, top)
    axis = tl.arange(0, D)
    total = tl.zeros([SLOTS], tl.float32)
    sums = tl.zeros([D], tl.float32)
    for begin in range(0, slots, SLOTS):
        slot = begin + tl.arange(0, SLOTS)
        shares = tl.exp(tl.load(lses + slot * count + query, slot < slots, other=float("-inf")) - level)
        total += shares
        chosen = (slot >= first) & (slot < stop) & (shares > 0.0)
        places = (slot * count + query)[:, None] * DIM + axis[None, :]
        parts = tl.load(outs + places, chosen[:, None] & (axis < DIM)[None, :], other=0.0)
        sums += tl.sum(parts * shares[:, None], 0)
    whole = tl.sum(total, 0)
    divisor = tl.where(whole > 0.0, whole, 1.0)
    share = sums / divisor
    # Without a rotation one program has all coordinates.
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if ROTATED:
        inside = (axis < DIM)[:, None] & (columns < DIM)[None, :]
        matrix = tl.load(rotation + axis[:, None] * DIM + columns[None, :], inside, other=0.0)
        share = tl.sum(share[:, None] * matrix, 0)
    into = out + query * DIM + columns
    if ADDED:
        share += tl.load(into, columns < DIM, other=0.0)
    tl.store(into, share, columns < DIM)
    tl.store(lse + query, top + tl.log(divisor))


def merge(outs: Tensor, lses: Tensor, spaces: list[tuple[int, int, Tensor | None]]) -> tuple[Tensor, Tensor]:
    """Merges splits space by space, and adds up what each space's are taken back to.

    Args:
        outs: ``[S, ..., d]`` float32, undefined where lses are -inf.
        lses: ``[S, ...]`` float32.
        spaces: of half-open ranges of splits, the rotation ``[d, d]`` that their outputs are behind, or None.

    Returns:
        ``out [..., d]`` and ``lse [...]``, float32.
    """
    lse = torch.empty_like(lses[0])
    if lse.numel() <= FEW:
        out = torch.empty_like(outs[0])
        for index, (first, stop, rotation) in enumerate(spaces):
            _merge(outs, lses, first, stop, rotation, out, lse, added=index > 0)
        return out, lse
    total: Tensor | None = None
    for first, stop, rotation in spaces:
        # One product for all queries reads the matrix once.
        share = torch.empty_like(outs[0])
        _merge(outs, lses, first, stop, None, share, lse, added=False)
        share = share if rotation is None else share @ rotation
        total = share if total is None else total + share
    assert total is not None
    return total, lse


def _merge(
    outs: Tensor, lses: Tensor, first: int, stop: int, rotation: Tensor | None, out: Tensor, lse: Tensor, *, added: bool
) -> None:
    dim, count = out.shape[-1], lse.numel()
    width = max(BLOCK, power_of_two(dim))
    columns = width if rotation is None else COLUMNS
    merge_splits[(count, _ceil(dim, columns))](
        outs,
        lses,
        outs if rotation is None else rotation,
        out,
        lse,
        count,
        first,
        stop,
        outs.shape[0],
        ROTATED=rotation is not None,
        ADDED=added,
        DIM=dim,
        D=width,
        SLOTS=BLOCK,
        COLUMNS=columns,
        enable_fp_fusion=True,
    )


def _ceil(number: int, by: int) -> int:
    return -(-number // by)
