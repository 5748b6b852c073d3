"""Triton: the exact search for codewords of two coordinates among the candidates of cells, and its launch.

Distances are single float32 operations in the reference's order: the kernel is launched without fusion of
multiplication and addition, which would round differently.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fibkv.kernels.triton_load import INTERPRETED
from fibkv.kernels.triton_sides import DeviceTables, per_program, power_of_two
from fibkv.packing import packed_nbytes
from fibkv.tables import FibTables

# Vectors of one program; the interpreter pays per program.
VECTORS = 1 << 12 if INTERPRETED else 1 << 4
WARPS = 8


@triton.jit
def _codeword(words, indices):
    """Both coordinates of codewords: ``words [N]`` int64 hold them as two float32."""
    flat = tl.reshape(indices, [indices.shape[0] * indices.shape[1] * indices.shape[2]])
    found = tl.reshape(tl.gather(words, flat, 0), indices.shape)
    return found.to(tl.int32).to(tl.float32, bitcast=True), (found >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _nearest_of(x, y, lists, words, SLOTS: tl.constexpr):
    """The nearest codeword of each list (ties: the first): its index and its coordinates."""
    nearest = tl.full(x.shape, float("inf"), tl.float32)
    index = tl.zeros(x.shape, tl.int32)
    along = tl.zeros(x.shape, tl.float32)
    across = tl.zeros(x.shape, tl.float32)
    for slot in tl.static_range(SLOTS):
        candidate = ((lists >> (8 * slot)) & 0xFF).to(tl.int32)
        first, second = _codeword(words, candidate)
        distance = (x - first) * (x - first) + (y - second) * (y - second)
        nearer = distance < nearest
        nearest = tl.minimum(distance, nearest)
        index = tl.where(nearer, candidate, index)
        along = tl.where(nearer, first, along)
        across = tl.where(nearer, second, across)
    return index, along, across


@triton.jit
def _nearest_of_all(x, y, codewords, words, SIZE: tl.constexpr):
    """As `_nearest_of`, of the whole book."""
    nearest = tl.full(x.shape, float("inf"), tl.float32)
    index = tl.zeros(x.shape, tl.int32)
    for candidate in range(SIZE):
        first = x - tl.load(codewords + 2 * candidate)
        second = y - tl.load(codewords + 2 * candidate + 1)
        distance = first * first + second * second
        index = tl.where(distance < nearest, candidate, index)
        nearest = tl.minimum(distance, nearest)
    along, across = _codeword(words, index)
    return index, along, across


@triton.jit
def _sum_of_vectors(terms):
    """Sums per vector, ``[VECTORS]``, of ``[PARTS, VECTORS, BLOCKS]``."""
    return tl.sum(tl.sum(terms, 0), 1)


@triton.jit
def _search(
    x,
    y,
    inside,
    lists,
    codewords,
    words,
    scales,
    NUM_SCALES: tl.constexpr,
    SIZE: tl.constexpr,
    SLOTS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Of the codes found at each scale those that point best, the first of equals: indices, <u, q> and <q, q>.

    With PADDED, blocks outside ``inside`` do not count. ``SLOTS`` is 0 for a search of the whole book. The products are
    float64 per vector.
    """
    wide_x, wide_y = x.to(tl.float64), y.to(tl.float64)
    best = tl.zeros(x.shape, tl.int32)
    best_along = tl.zeros([x.shape[1]], tl.float64)
    best_energy = tl.full([x.shape[1]], 1.0, tl.float64)
    for step in tl.static_range(NUM_SCALES):
        scale = tl.load(scales + step)
        if SLOTS:
            found, first, second = _nearest_of(x * scale, y * scale, lists, words, SLOTS)
        else:
            found, first, second = _nearest_of_all(x * scale, y * scale, codewords, words, SIZE)
        if PADDED:
            first, second = tl.where(inside, first, 0.0), tl.where(inside, second, 0.0)
        wide_first, wide_second = first.to(tl.float64), second.to(tl.float64)
        along = _sum_of_vectors(tl.fma(wide_x, wide_first, wide_y * wide_second))
        energy = _sum_of_vectors(tl.fma(wide_first, wide_first, wide_second * wide_second))
        energy = tl.where(energy == 0.0, 1.0, energy)
        # Cosines are compared by their signed squares, without roots and quotients.
        better = along * tl.abs(along) * best_energy > best_along * tl.abs(best_along) * energy
        better = better | (step == 0)
        best_along = tl.where(better, along, best_along)
        best_energy = tl.where(better, energy, best_energy)
        best = tl.where(better[None, :, None], found, best)
    return best, best_along, best_energy


@triton.jit
def _store_packed(
    packed, vectors, mask, indices, BITS: tl.constexpr, NBYTES: tl.constexpr, PARTS: tl.constexpr, BLOCKS: tl.constexpr
):
    """Stores ``indices [PARTS, VECTORS, BLOCKS / PARTS]`` as little-endian bit streams of NBYTES bytes per vector."""
    if BITS == 8:
        place = tl.arange(0, PARTS)[:, None, None] * (BLOCKS // PARTS) + tl.arange(0, BLOCKS // PARTS)[None, None, :]
        inside = mask[None, :, None] & (place < NBYTES)
        tl.store(packed + vectors[None, :, None] * NBYTES + place, indices.to(tl.uint8), inside)
    else:
        # Eight indices are BITS bytes.
        runs: tl.constexpr = BLOCKS // PARTS // 8
        shifts = tl.arange(0, 8)
        eights = tl.reshape(indices.to(tl.int64), [PARTS, indices.shape[1], runs, 8])
        stream = tl.sum(eights << (shifts * BITS)[None, None, None, :], 3)
        octets = (stream[:, :, :, None] >> (shifts * 8)[None, None, None, :]) & 0xFF
        part = tl.arange(0, PARTS)[:, None, None, None] * runs
        place = (part + tl.arange(0, runs)[None, None, :, None]) * BITS + shifts[None, None, None, :]
        inside = mask[None, :, None, None] & (shifts < BITS)[None, None, None, :] & (place < NBYTES)
        tl.store(packed + vectors[None, :, None, None] * NBYTES + place, octets.to(tl.uint8), inside)


@triton.jit
def search_cells(
    rotated,
    lengths,
    codewords,
    scales,
    lists,
    packed,
    norms,
    count,
    extent,
    density,
    NUM_SCALES: tl.constexpr,
    SIDE: tl.constexpr,
    SLOTS: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    NBYTES: tl.constexpr,
    GAIN: tl.constexpr,
    PARTS: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Codes of ``rotated [count, DIM]`` float32: ``packed [count, NBYTES]``, and ``norms [count]`` float64.

    ``codewords [N, 2]`` float32 are filled up to a power of two, SIZE of them count; ``lists`` are of `candidates`.
    ``PARTS`` of a vector lie in the registers of a thread, which then has more of one vector to add up. With GAIN,
    norms are ``lengths [count]`` float64 times the least-squares factor of what was found.
    """
    vectors = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    mask = vectors < count
    width: tl.constexpr = D // PARTS
    axis = tl.arange(0, PARTS)[:, None, None] * width + tl.arange(0, width)[None, None, :]
    numbers = tl.load(rotated + vectors[None, :, None] * DIM + axis, mask[None, :, None] & (axis < DIM), other=0.0)
    x, y = tl.split(tl.reshape(numbers, [PARTS, VECTORS, width // 2, 2]))
    row = tl.minimum(tl.maximum(((x + extent) * density).to(tl.int32), 0), SIDE - 1)
    column = tl.minimum(tl.maximum(((y + extent) * density).to(tl.int32), 0), SIDE - 1)
    found = tl.load(lists + row * SIDE + column)
    BOOK: tl.constexpr = 1 << BITS
    words = tl.load(codewords.to(tl.pointer_type(tl.int64)) + tl.arange(0, BOOK))
    place = tl.arange(0, PARTS)[:, None, None] * (width // 2) + tl.arange(0, width // 2)[None, None, :]
    inside = place < DIM // 2
    # A list that falls stands for the whole book.
    whole = tl.max(tl.reshape(((found & 0xFF) > ((found >> 8) & 0xFF)).to(tl.int32), [D // 2 * VECTORS]), 0)
    if whole:
        indices, along, energy = _search(x, y, inside, found, codewords, words, scales, NUM_SCALES, SIZE, 0, D > DIM)
    else:
        indices, along, energy = _search(
            x, y, inside, found, codewords, words, scales, NUM_SCALES, SIZE, SLOTS, D > DIM
        )
    length = tl.load(lengths + vectors, mask, other=0.0)
    if GAIN:
        # A norm is not negative: where the nearest codewords point away zero is best.
        length *= tl.maximum(along / energy, 0.0)
    tl.store(norms + vectors, length, mask)
    _store_packed(packed, vectors, mask, indices, BITS, NBYTES, PARTS, D // 2)


def search(
    rotated: Tensor, lengths: Tensor, tables: FibTables, device_tables: DeviceTables, packed: Tensor, norms: Tensor
) -> None:
    """Codes and norms of rotated unit vectors, by a codebook in the plane.

    Args:
        rotated: ``[V, d]`` float32.
        lengths: ``[V]`` float64, norms of the vectors.
        tables: of the codec.
        device_tables: the same, on the vectors' device, with candidates.
        packed: ``[V, bytes]`` uint8, which receives the indices.
        norms: ``[V]`` float64, which receives what is to be stored as norms.
    """
    count, dim = rotated.shape
    cells = device_tables.candidates
    assert cells is not None
    width = max(16, power_of_two(dim))
    vectors = per_program(count, VECTORS)
    search_cells[(triton.cdiv(count, vectors),)](
        rotated,
        lengths,
        device_tables.codewords,
        device_tables.scales,
        cells.lists,
        packed,
        norms,
        count,
        cells.extent,
        cells.side / (2 * cells.extent),
        NUM_SCALES=len(tables.scales),
        SIDE=cells.side,
        SLOTS=cells.slots,
        SIZE=tables.codewords.shape[0],
        DIM=dim,
        D=width,
        BITS=tables.bits,
        NBYTES=packed_nbytes(tables.num_blocks, tables.bits),
        GAIN=tables.gain_corrected,
        PARTS=2 if width >= 32 else 1,
        VECTORS=vectors,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
