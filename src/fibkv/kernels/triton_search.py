"""Triton: the exact search for codewords of two coordinates among the candidates of cells, and its launch.

Distances are single float32 operations in the reference's order: the kernel is launched without fusion of
multiplication and addition, which would round differently.

A program's blocks stand in one flat order, vector by vector: every tensor has the layout of the others then, so that
nothing moves between threads but the sums of vectors.
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
VECTORS = 1 << 12 if INTERPRETED else 1 << 3
WARPS = 4


@triton.jit
def _codeword(words, indices):
    """Both coordinates of codewords ``indices [n]``: ``words [N]`` int64 hold them as two float32."""
    found = tl.gather(words, indices, 0)
    return found.to(tl.int32).to(tl.float32, bitcast=True), (found >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _distance(x, y, first, second):
    away, aside = x - first, y - second
    return away * away + aside * aside


@triton.jit
def _key(distance, index):
    """int64 in the order of distances, and of indices where these are equal: bits of numbers >= 0 have their order."""
    return (distance.to(tl.int32, bitcast=True).to(tl.int64) << 32) | index.to(tl.int64)


@triton.jit
def _nearest_of(x, y, lists, words, START: tl.constexpr, WIDTH: tl.constexpr):
    """The nearest codeword in a window of each list (ties: the lower index): its index and its coordinates."""
    index = ((lists >> (8 * START)) & 0xFF).to(tl.int32)
    along, across = _codeword(words, index)
    nearest = _distance(x, y, along, across)
    for entry in tl.static_range(START + 1, START + WIDTH):
        candidate = ((lists >> (8 * entry)) & 0xFF).to(tl.int32)
        first, second = _codeword(words, candidate)
        distance = _distance(x, y, first, second)
        nearer = _key(distance, candidate) < _key(nearest, index)
        nearest = tl.where(nearer, distance, nearest)
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
        distance = _distance(x, y, tl.load(codewords + 2 * candidate), tl.load(codewords + 2 * candidate + 1))
        index = tl.where(distance < nearest, candidate, index)
        nearest = tl.minimum(distance, nearest)
    along, across = _codeword(words, index)
    return index, along, across


@triton.jit
def _sum_of_vectors(terms, VECTORS: tl.constexpr):
    """Sums of each vector's terms, ``[VECTORS]``."""
    return tl.sum(tl.reshape(terms, [VECTORS, terms.shape[0] // VECTORS]), 1)


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
    STARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Of the codes found at each scale those that point best, the first of equals: indices, <u, q> and <q, q>.

    With PADDED, blocks outside ``inside`` do not count. STARTS has four bits for each scale; WIDTH is 0 for a search of
    the whole book. The products are float64 per vector.
    """
    wide_x, wide_y = x.to(tl.float64), y.to(tl.float64)
    best = tl.zeros(x.shape, tl.int32)
    best_along = tl.zeros([VECTORS], tl.float64)
    best_energy = tl.full([VECTORS], 1.0, tl.float64)
    for step in tl.static_range(NUM_SCALES):
        scale = tl.load(scales + step)
        if WIDTH:
            found, first, second = _nearest_of(x * scale, y * scale, lists, words, (STARTS >> (4 * step)) & 15, WIDTH)
        else:
            found, first, second = _nearest_of_all(x * scale, y * scale, codewords, words, SIZE)
        if PADDED:
            first, second = tl.where(inside, first, 0.0), tl.where(inside, second, 0.0)
        wide_first, wide_second = first.to(tl.float64), second.to(tl.float64)
        along = _sum_of_vectors(tl.fma(wide_x, wide_first, wide_y * wide_second), VECTORS)
        energy = _sum_of_vectors(tl.fma(wide_first, wide_first, wide_second * wide_second), VECTORS)
        energy = tl.where(energy == 0.0, 1.0, energy)
        # Cosines are compared by their signed squares, without roots and quotients.
        better = along * tl.abs(along) * best_energy > best_along * tl.abs(best_along) * energy
        better = better | (step == 0)
        best_along = tl.where(better, along, best_along)
        best_energy = tl.where(better, energy, best_energy)
        better = tl.broadcast_to(better[:, None], [VECTORS, x.shape[0] // VECTORS])
        best = tl.where(tl.reshape(better, [x.shape[0]]), found, best)
    return best, best_along, best_energy


@triton.jit
def _store_packed(packed, start, count, indices, BITS: tl.constexpr, NBYTES: tl.constexpr, VECTORS: tl.constexpr):
    """Stores indices ``[n]`` as little-endian bit streams of NBYTES bytes per vector."""
    BLOCKS: tl.constexpr = indices.shape[0] // VECTORS
    if BITS == 8:
        lane = tl.arange(0, indices.shape[0])
        vectors, place = start + lane // BLOCKS, lane % BLOCKS
        tl.store(packed + vectors * NBYTES + place, indices.to(tl.uint8), (vectors < count) & (place < NBYTES))
    else:
        # Eight indices are BITS bytes.
        RUNS: tl.constexpr = BLOCKS // 8
        vectors = start + tl.arange(0, VECTORS)[:, None, None]
        shifts = tl.arange(0, 8)[None, None, :]
        stream = tl.sum(tl.reshape(indices.to(tl.int64), [VECTORS, RUNS, 8]) << (shifts * BITS), 2)
        octets = (stream[:, :, None] >> (shifts * 8)) & 0xFF
        place = tl.arange(0, RUNS)[None, :, None] * BITS + shifts
        inside = (vectors < count) & (shifts < BITS) & (place < NBYTES)
        tl.store(packed + vectors * NBYTES + place, octets.to(tl.uint8), inside)


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
    STARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    NBYTES: tl.constexpr,
    GAIN: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Codes of ``rotated [count, DIM]`` float32: ``packed [count, NBYTES]``, and ``norms [count]`` float64.

    ``codewords [N, 2]`` float32 are filled up to a power of two, SIZE of them count; ``lists``, STARTS and WIDTH are of
    `candidates`. With GAIN, norms are ``lengths [count]`` float64 times the least-squares factor of what was found.
    """
    start = tl.program_id(0).to(tl.int64) * VECTORS
    lane = tl.arange(0, VECTORS * D // 2)
    vector, block = start + lane // (D // 2), lane % (D // 2)
    inside = block < DIM // 2
    # Both coordinates of a block at once.
    pairs = rotated.to(tl.pointer_type(tl.int64)) + vector * (DIM // 2) + block
    numbers = tl.load(pairs, (vector < count) & inside, other=0)
    x = numbers.to(tl.int32).to(tl.float32, bitcast=True)
    y = (numbers >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    row = tl.minimum(tl.maximum(((x + extent) * density).to(tl.int32), 0), SIDE - 1)
    column = tl.minimum(tl.maximum(((y + extent) * density).to(tl.int32), 0), SIDE - 1)
    found = tl.load(lists + row * SIDE + column)
    BOOK: tl.constexpr = 1 << BITS
    words = tl.load(codewords.to(tl.pointer_type(tl.int64)) + tl.arange(0, BOOK))
    # Lists below 0 stand for the whole book.
    if tl.min((found >> 32).to(tl.int32), 0) < 0:
        indices, along, energy = _search(
            x, y, inside, found, codewords, words, scales, NUM_SCALES, SIZE, STARTS, 0, D > DIM, VECTORS
        )
    else:
        indices, along, energy = _search(
            x, y, inside, found, codewords, words, scales, NUM_SCALES, SIZE, STARTS, WIDTH, D > DIM, VECTORS
        )
    _store_packed(packed, start, count, indices, BITS, NBYTES, VECTORS)
    vectors = start + tl.arange(0, VECTORS)
    length = tl.load(lengths + vectors, vectors < count, other=0.0)
    if GAIN:
        # A norm is not negative: where the nearest codewords point away zero is best.
        length *= tl.maximum(along / energy, 0.0)
    tl.store(norms + vectors, length, vectors < count)


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
        # Triton before 3.8 finds no constants in tuples.
        STARTS=sum(start << (4 * step) for step, start in enumerate(cells.starts)),
        WIDTH=cells.width,
        SIZE=tables.codewords.shape[0],
        DIM=dim,
        D=width,
        BITS=tables.bits,
        NBYTES=packed_nbytes(tables.num_blocks, tables.bits),
        GAIN=tables.gain_corrected,
        VECTORS=vectors,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
