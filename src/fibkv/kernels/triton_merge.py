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

# Queries of a program: as many as a matrix unit takes at least, or one where there are few.
BLOCK, FEW = 16, 256
# Columns of a program: blocks of a matrix that shared memory has room for.
COLUMNS = 64


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
    columns = min(COLUMNS, max(BLOCK, power_of_two(dim)))
    _turn[(triton.cdiv(count, BLOCK), triton.cdiv(dim, columns))](
        octets(query),
        rotation,
        plain,
        turned,
        count,
        FORM=FORMS[query.dtype],
        DIM=dim,
        D=max(BLOCK, power_of_two(dim)),
        QUERIES=BLOCK,
        COLUMNS=columns,
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
    QUERIES: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The share of splits ``first:stop`` in attention over all ``slots`` splits, by log-sum-exp.

    Grid: (blocks of QUERIES queries, blocks of COLUMNS coordinates).

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
    queries = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    used = queries < count
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    # Without a rotation a program's coordinates are those that it adds up.
    axis = tl.arange(0, D) if ROTATED else columns
    peak = tl.full([SLOTS, QUERIES], float("-inf"), tl.float32)
    for begin in range(0, slots, SLOTS):
        slot = begin + tl.arange(0, SLOTS)[:, None]
        seen = (slot < slots) & used[None, :]
        peak = tl.maximum(peak, tl.load(lses + slot * count + queries[None, :], seen, other=float("-inf")))
    top = tl.max(peak, 0)
    level = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([SLOTS, QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, axis.shape[0]], tl.float32)
    for begin in range(0, slots, SLOTS):
        slot = begin + tl.arange(0, SLOTS)[:, None]
        seen = (slot < slots) & used[None, :]
        shares = tl.exp(tl.load(lses + slot * count + queries[None, :], seen, other=float("-inf")) - level[None, :])
        total += shares
        chosen = seen & (slot >= first) & (slot < stop) & (shares > 0.0)
        places = (slot * count + queries[None, :])[:, :, None] * DIM + axis[None, None, :]
        parts = tl.load(outs + places, chosen[:, :, None] & (axis < DIM)[None, None, :], other=0.0)
        sums += tl.sum(parts * shares[:, :, None], 0)
    whole = tl.sum(total, 0)
    divisor = tl.where(whole > 0.0, whole, 1.0)
    sums = sums / divisor[:, None]
    if ROTATED:
        inside = (axis < DIM)[:, None] & (columns < DIM)[None, :]
        matrix = tl.load(rotation + axis[:, None] * DIM + columns[None, :], inside, other=0.0)
        if QUERIES > 1:
            sums = tl.dot(sums, matrix, input_precision="ieee")
        else:
            sums = tl.sum(tl.trans(sums) * matrix, 0)[None, :]
    into = out + queries[:, None] * DIM + columns[None, :]
    wanted = used[:, None] & (columns < DIM)[None, :]
    if ADDED:
        sums += tl.load(into, wanted, other=0.0)
    tl.store(into, sums, wanted)
    tl.store(lse + queries, top + tl.log(divisor), used)


def merge(outs: Tensor, lses: Tensor, spaces: list[tuple[int, int, Tensor | None]]) -> tuple[Tensor, Tensor]:
    """Merges splits space by space, and adds up what each space's are taken back to.

    Args:
        outs: ``[S, ..., d]`` float32, undefined where lses are -inf.
        lses: ``[S, ...]`` float32.
        spaces: of half-open ranges of splits, the rotation ``[d, d]`` that their outputs are behind, or None.

    Returns:
        ``out [..., d]`` and ``lse [...]``, float32.
    """
    out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    dim, count = out.shape[-1], lse.numel()
    width = max(BLOCK, power_of_two(dim))
    queries = 1 if count <= FEW else BLOCK
    for index, (first, stop, rotation) in enumerate(spaces):
        columns = width if rotation is None else min(COLUMNS, width)
        merge_splits[(triton.cdiv(count, queries), triton.cdiv(dim, columns))](
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
            ADDED=index > 0,
            DIM=dim,
            D=width,
            QUERIES=queries,
            SLOTS=BLOCK // queries,
            COLUMNS=columns,
            enable_fp_fusion=True,
        )
    return out, lse
