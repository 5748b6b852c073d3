"""Triton: the kernels that find codewords of any book and pack their indices, and their launches.

Distances are single float32 operations in the reference's order. Kernels that decide codes are launched without
fusion of multiplication and addition, which would round differently.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fibkv.kernels.triton_load import INTERPRETED
from fibkv.kernels.triton_sides import DeviceTables, per_program, power_of_two
from fibkv.packing import packed_nbytes
from fibkv.tables import FibTables

# Distances that one program holds at a time; the interpreter pays per program.
TILE = 1 << 20 if INTERPRETED else 1 << 13
# Codewords that are compared at a time.
CODEWORDS = 1 << 10 if INTERPRETED else 1 << 5
# Blocks of one program that keeps its blocks in registers: eight in each thread.
BLOCKS = 1 << 20 if INTERPRETED else 1 << 10
# Coordinates of such blocks.
IN_REGISTERS = (1, 2, 4)


@triton.jit
def _nearest(rotated, starts, scale, codewords, mask, SIZE: tl.constexpr, BLOCK: tl.constexpr, CODEWORDS: tl.constexpr):
    """Index of the nearest codeword (ties: the lower one) of the blocks at ``rotated + starts [R]``, times scale."""
    nearest = tl.full(starts.shape, float("inf"), tl.float32)
    found = tl.zeros(starts.shape, tl.int32)
    for first in range(0, SIZE, CODEWORDS):
        words = first + tl.arange(0, CODEWORDS)
        distances = tl.where(words < SIZE, 0.0, float("inf"))[None, :] + tl.zeros(starts.shape, tl.float32)[:, None]
        for axis in range(BLOCK):
            numbers = tl.load(rotated + starts + axis, mask, other=0.0) * scale
            entries = tl.load(codewords + words * BLOCK + axis, words < SIZE, other=0.0)
            difference = numbers[:, None] - entries[None, :]
            distances += difference * difference
        least, place = tl.min(distances, 1, return_indices=True, return_indices_tie_break_left=True)
        found = tl.where(least < nearest, first + place, found)
        nearest = tl.minimum(least, nearest)
    return found


@triton.jit
def _nearest_by_word(rotated, starts, scale, codewords, mask, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """As `_nearest`, for blocks of 1, 2 or 4 that stay in registers: codewords pass by, one after another."""
    x = tl.load(rotated + starts, mask, other=0.0) * scale
    y, z, w = x, x, x
    if BLOCK > 1:
        y = tl.load(rotated + starts + 1, mask, other=0.0) * scale
    if BLOCK > 2:
        z = tl.load(rotated + starts + 2, mask, other=0.0) * scale
        w = tl.load(rotated + starts + 3, mask, other=0.0) * scale
    nearest = tl.full(starts.shape, float("inf"), tl.float32)
    found = tl.zeros(starts.shape, tl.int32)
    for word in range(SIZE):
        entries = codewords + word * BLOCK
        away = x - tl.load(entries)
        distance = away * away
        if BLOCK > 1:
            away = y - tl.load(entries + 1)
            distance += away * away
        if BLOCK > 2:
            away = z - tl.load(entries + 2)
            distance += away * away
            away = w - tl.load(entries + 3)
            distance += away * away
        found = tl.where(distance < nearest, word, found)
        nearest = tl.minimum(distance, nearest)
    return found


@triton.jit
def _look_up(rotated, starts, scale, cells, mask, extent, density, SIDE: tl.constexpr):
    """Index of a codeword from a decision table, for the blocks of two at ``rotated + starts [R]``, times scale."""
    row = (tl.load(rotated + starts, mask, other=0.0) * scale + extent) * density
    column = (tl.load(rotated + starts + 1, mask, other=0.0) * scale + extent) * density
    last = SIDE - 1
    place = tl.clamp(row, 0.0, last).to(tl.int32) * SIDE + tl.clamp(column, 0.0, last).to(tl.int32)
    return tl.load(cells + place, mask, other=0).to(tl.int32)


@triton.jit
def _products(
    rotated, starts, indices, codewords, mask, VECTORS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr
):
    """<u, q> and <q, q> per vector, ``[VECTORS]`` float64, of blocks and what they were quantized to."""
    along = tl.zeros(starts.shape, tl.float64)
    energy = tl.zeros(starts.shape, tl.float64)
    for axis in range(BLOCK):
        numbers = tl.load(rotated + starts + axis, mask, other=0.0).to(tl.float64)
        entries = tl.load(codewords + indices * BLOCK + axis, mask, other=0.0).to(tl.float64)
        along += numbers * entries
        energy += entries * entries
    return tl.sum(tl.reshape(along, [VECTORS, BLOCKS]), 1), tl.sum(tl.reshape(energy, [VECTORS, BLOCKS]), 1)


@triton.jit
def _search(
    rotated,
    codewords,
    cells,
    scales,
    out,
    gains,
    count,
    extent,
    density,
    NUM_SCALES: tl.constexpr,
    SIDE: tl.constexpr,
    SIZE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCKS: tl.constexpr,
    CODEWORDS: tl.constexpr,
):
    """Codewords of ``rotated [count, NUM_BLOCKS * BLOCK]``: ``out [count, NUM_BLOCKS]`` int32, ``gains`` float64.

    Of the codes found at each of ``scales`` those that point best are kept, the first of equals. ``BLOCKS`` is
    NUM_BLOCKS rounded up to a power of two; ``SIDE`` is 0 where there is no decision table. ``CODEWORDS`` are compared
    at a time; 1 takes blocks of 1, 2 or 4.
    """
    lane = tl.arange(0, VECTORS * BLOCKS)
    vectors = tl.program_id(0).to(tl.int64) * VECTORS + lane // BLOCKS
    blocks = lane % BLOCKS
    mask = (vectors < count) & (blocks < NUM_BLOCKS)
    starts = (vectors * NUM_BLOCKS + blocks) * BLOCK
    best = tl.zeros([VECTORS * BLOCKS], tl.int32)
    cosine = tl.full([VECTORS], float("-inf"), tl.float64)
    for index in range(NUM_SCALES):
        scale = tl.load(scales + index)
        if SIDE:
            found = _look_up(rotated, starts, scale, cells, mask, extent, density, SIDE)
        elif CODEWORDS == 1:
            found = _nearest_by_word(rotated, starts, scale, codewords, mask, SIZE, BLOCK)
        else:
            found = _nearest(rotated, starts, scale, codewords, mask, SIZE, BLOCK, CODEWORDS)
        along, energy = _products(rotated, starts, found, codewords, mask, VECTORS, BLOCKS, BLOCK)
        reached = along / tl.sqrt(tl.where(energy == 0.0, 1.0, energy))
        better = tl.broadcast_to((reached > cosine)[:, None], [VECTORS, BLOCKS])
        best = tl.where(tl.reshape(better, [VECTORS * BLOCKS]), found, best)
        cosine = tl.maximum(reached, cosine)
    tl.store(out + vectors * NUM_BLOCKS + blocks, best, mask)
    along, energy = _products(rotated, starts, best, codewords, mask, VECTORS, BLOCKS, BLOCK)
    vector = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    # A norm is not negative: where the nearest codewords point away zero is best.
    gain = tl.maximum(along / tl.where(energy == 0.0, 1.0, energy), 0.0)
    tl.store(gains + vector, gain, vector < count)


@triton.jit
def _pack(
    indices, packed, count, NUM_BLOCKS: tl.constexpr, BITS: tl.constexpr, NBYTES: tl.constexpr, TILE: tl.constexpr
):
    """``indices [count, NUM_BLOCKS]`` int32 to ``packed [count, NBYTES]``: a little-endian bit stream per vector."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = place < count * NBYTES
    vectors, bit = place // NBYTES, (place % NBYTES).to(tl.int32) * 8
    octets = tl.zeros([TILE], tl.int32)
    # Indices that can have bits in one byte.
    for step in tl.static_range((BITS + 14) // BITS):
        block = bit // BITS + step
        index = tl.load(indices + vectors * NUM_BLOCKS + block, mask & (block < NUM_BLOCKS), other=0)
        shift = block * BITS - bit
        octets |= tl.where(shift < 0, index >> tl.maximum(-shift, 0), index << tl.minimum(tl.maximum(shift, 0), 8))
    tl.store(packed + place, (octets & 0xFF).to(tl.uint8), mask)


def nearest_codewords(rotated: Tensor, tables: FibTables, device_tables: DeviceTables) -> tuple[Tensor, Tensor]:
    """Codes of rotated unit vectors.

    Args:
        rotated: ``[V, d]`` float32.
        tables: of the codec.
        device_tables: the same, on the vectors' device.

    Returns:
        ``[V, bytes]`` uint8 packed indices, and ``[V]`` float64 gains: the least-squares factor of what was found.
    """
    rotated = rotated.contiguous()
    count, blocks = rotated.shape[0], power_of_two(tables.num_blocks)
    size, block = tables.codewords.shape
    in_registers = block in IN_REGISTERS
    codewords = 1 if in_registers else min(CODEWORDS, power_of_two(size))
    vectors = per_program(count, max(1, (BLOCKS if in_registers else TILE // codewords) // blocks))
    decisions = tables.decisions
    indices = torch.empty(count, tables.num_blocks, dtype=torch.int32, device=rotated.device)
    gains = torch.empty(count, dtype=torch.float64, device=rotated.device)
    _search[(triton.cdiv(count, vectors),)](
        rotated,
        device_tables.codewords,
        device_tables.cells,
        device_tables.scales,
        indices,
        gains,
        count,
        0.0 if decisions is None else decisions.extent,
        0.0 if decisions is None else decisions.side / (2 * decisions.extent),
        NUM_SCALES=len(tables.scales),
        SIDE=0 if decisions is None else decisions.side,
        SIZE=size,
        NUM_BLOCKS=tables.num_blocks,
        BLOCK=block,
        VECTORS=vectors,
        BLOCKS=blocks,
        CODEWORDS=codewords,
        enable_fp_fusion=False,
    )
    packed = torch.empty(count, packed_nbytes(tables.num_blocks, tables.bits), dtype=torch.uint8, device=rotated.device)
    tile = per_program(packed.numel(), TILE)
    _pack[(triton.cdiv(packed.numel(), tile),)](
        indices,
        packed,
        count,
        NUM_BLOCKS=tables.num_blocks,
        BITS=tables.bits,
        NBYTES=packed.shape[1],
        TILE=tile,
        enable_fp_fusion=False,
    )
    return packed, gains
