"""Triton: from vectors as a model has them to what a search for codewords sees, and from norms to their codes.

Everything here decides codes before they are rounded, so it is float64: products run on the matrix units for float64
where a device has some.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fibkv.kernels.triton_load import INTERPRETED
from fibkv.kernels.triton_sides import FORMS, DeviceTables, octets, per_program

# Vectors of one program, and coordinates of them that it reads at a time; the interpreter pays per program.
VECTORS = 1 << 12 if INTERPRETED else 1 << 5
COORDINATES = 1 << 4
WARPS = 4
# Norms that a program codes at a time.
NORMS = 1 << 10
# A float64 of this size has no fraction: adding and subtracting it rounds smaller ones to even.
WHOLE = tl.constexpr(1.5 * 2.0**52)
FLOAT16_MAX = tl.constexpr(65504.0)
FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _wide(numbers):
    """Float32 numbers as float64, 0 for what is not finite, and their squares."""
    finite = tl.abs(numbers) < float("inf")
    wide = tl.where(finite, numbers, 0.0).to(tl.float64)
    # The squares of float32 numbers neither overflow nor vanish in float64.
    return wide, tl.where(finite, wide * wide, float("inf"))


@triton.jit
def rotate(
    rows,
    matrix,
    rotated,
    lengths,
    refused,
    count,
    FORM: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    VECTORS: tl.constexpr,
    COORDINATES: tl.constexpr,
):
    """Unit vectors ``rotated [count, DIM]`` float32, rounded once, and their ``lengths [count]`` float64.

    ``rows [count, DIM]`` are ``f32``, or ``f16`` or ``bf16`` with an even DIM. ``matrix [D, D]`` float32 is the
    transposed rotation, filled up with zeros. ``refused [1]`` (a byte) is set where a vector is not finite.
    """
    vectors = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    mask = vectors < count
    axis = tl.arange(0, D)
    energy = tl.zeros([VECTORS], tl.float64)
    turned = tl.zeros([VECTORS, D], tl.float64)
    if FORM == "f32":
        for first in range(0, D, COORDINATES):
            part = first + tl.arange(0, COORDINATES)
            inside = mask[:, None] & (part < DIM)[None, :]
            numbers = tl.load(
                rows.to(tl.pointer_type(tl.float32)) + vectors[:, None] * DIM + part[None, :], inside, 0.0
            )
            wide, squares = _wide(numbers)
            energy += tl.sum(squares, 1)
            turned = tl.dot(
                wide, tl.load(matrix + part[:, None] * D + axis[None, :]).to(tl.float64), turned, out_dtype=tl.float64
            )
    else:
        # Two neighbours at a time: Triton 3.6 has no products in float64 of what was loaded in 16 bits.
        for first in range(0, D // 2, COORDINATES):
            part = first + tl.arange(0, COORDINATES)
            inside = mask[:, None] & (part < DIM // 2)[None, :]
            words = tl.load(
                rows.to(tl.pointer_type(tl.int32)) + vectors[:, None] * (DIM // 2) + part[None, :], inside, 0
            )
            for side in tl.static_range(2):
                if FORM == "bf16":
                    bits = (words << 16) if side == 0 else (words & -65536)
                    numbers = bits.to(tl.float32, bitcast=True)
                else:
                    numbers = (words >> (16 * side)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
                wide, squares = _wide(numbers)
                energy += tl.sum(squares, 1)
                turning = tl.load(matrix + (2 * part + side)[:, None] * D + axis[None, :]).to(tl.float64)
                turned = tl.dot(wide, turning, turned, out_dtype=tl.float64)
    finite = energy < float("inf")
    tl.store(refused + vectors * 0, 1, mask & ~finite)
    length = tl.sqrt(tl.where(finite, energy, 0.0))
    tl.store(lengths + vectors, length, mask)
    inverse = tl.where(length == 0.0, 0.0, 1.0 / tl.where(length == 0.0, 1.0, length))
    places = rotated + vectors[:, None] * DIM + axis[None, :]
    tl.store(places, (turned * inverse[:, None]).to(tl.float32), mask[:, None] & (axis < DIM)[None, :])


@triton.jit
def _logarithms(norms, start, part, tokens):
    """log2 of norms, float64, and whether each is one of a vector that is there and not zero."""
    inside = part < tokens
    values = tl.load(norms + start + part, inside, other=0.0)
    there = inside & (values > 0.0)
    return tl.log2(tl.where(there, values, 1.0)), there


@triton.jit
def log_norms(norms, codes, ranges, refused, tokens, NORMS: tl.constexpr):
    """``norms [groups, tokens]`` float64 >= 0 to ``codes`` (bytes) and ``ranges [groups, 2]`` (float16): `FibCodes`.

    ``refused [1]`` (a byte) is set where a norm is not finite in float32.
    """
    group = tl.program_id(0).to(tl.int64)
    start = group * tokens
    low = tl.full([NORMS], float("inf"), tl.float64)
    high = tl.full([NORMS], float("-inf"), tl.float64)
    for first in range(0, tokens, NORMS):
        logs, there = _logarithms(norms, start, first + tl.arange(0, NORMS), tokens)
        low = tl.minimum(low, tl.where(there, logs, float("inf")))
        high = tl.maximum(high, tl.where(there, logs, float("-inf")))
    lowest, highest = tl.min(low, 0), tl.max(high, 0)
    empty = lowest > highest
    # Both numbers are rounded outwards to steps that float16 holds exactly over the whole range of float32 norms.
    lowest = tl.floor(tl.where(empty, 0.0, lowest) * 8.0) / 8.0
    step = tl.maximum(tl.ceil((tl.where(empty, 0.0, highest) - lowest) / 254.0 * 1024.0), 1.0) / 1024.0
    tl.store(ranges + group * 2, lowest.to(tl.float32).to(tl.float16))
    tl.store(ranges + group * 2 + 1, step.to(tl.float32).to(tl.float16))
    for first in range(0, tokens, NORMS):
        part = first + tl.arange(0, NORMS)
        logs, there = _logarithms(norms, start, part, tokens)
        numbers = ((logs - lowest) / step + WHOLE) - WHOLE
        numbers = tl.minimum(tl.maximum(numbers, 0.0), 254.0).to(tl.int32) + 1
        tl.store(codes + start + part, tl.where(there, numbers, 0).to(tl.uint8), part < tokens)
        values = tl.load(norms + start + part, part < tokens, other=0.0)
        tl.store(refused + part * 0, 1, ~(values <= FLOAT32_MAX))


@triton.jit
def half_norms(norms, codes, refused, count, NORMS: tl.constexpr):
    """``norms [count]`` float64 >= 0 to float16; ``refused [1]`` (a byte) is set where one is too large for it."""
    places = tl.program_id(0).to(tl.int64) * NORMS + tl.arange(0, NORMS)
    mask = places < count
    values = tl.load(norms + places, mask, other=0.0)
    tl.store(refused + places * 0, 1, mask & ~(values <= FLOAT16_MAX))
    tl.store(codes + places, tl.minimum(values, FLOAT16_MAX).to(tl.float16), mask)


def unit_vectors(rows: Tensor, device_tables: DeviceTables, refused: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated unit vectors.

    Args:
        rows: ``[groups, T, d]``, contiguous, of a dtype of `triton_sides.FLOATS`.
        device_tables: of the codec, on the rows' device.
        refused: ``[]`` bool, set where a vector is not finite.

    Returns:
        ``[V, d]`` float32, and the vectors' norms ``[V]`` float64.
    """
    dim = rows.shape[-1]
    if rows.dtype != torch.float32 and dim % 2:
        rows = rows.to(torch.float32)
    count = rows.shape[:-1].numel()
    rotated = torch.empty(count, dim, device=rows.device)
    lengths = torch.empty(count, dtype=torch.float64, device=rows.device)
    vectors = max(16, per_program(count, VECTORS))
    rotate[(triton.cdiv(count, vectors),)](
        octets(rows),
        device_tables.turning,
        rotated,
        lengths,
        refused.view(torch.uint8),
        count,
        FORM=FORMS[rows.dtype],
        DIM=dim,
        D=device_tables.turning.shape[0],
        VECTORS=vectors,
        COORDINATES=COORDINATES,
        num_warps=WARPS,
        num_stages=2,
        enable_fp_fusion=True,
    )
    return rotated, lengths


def stored_norms(norms: Tensor, norm_format: str, refused: Tensor) -> tuple[Tensor, Tensor]:
    """Norms ``[groups, T]`` float64 >= 0 to (codes, ranges) of `FibCodes`; ``refused []`` bool is set where one is out
    of the format's range."""
    groups, tokens = norms.shape
    broken = refused.view(torch.uint8)
    if norm_format == "f16":
        halves = torch.empty_like(norms, dtype=torch.float16)
        half_norms[(triton.cdiv(norms.numel(), NORMS),)](norms, halves, broken, norms.numel(), NORMS=NORMS)
        return halves, halves.new_empty(groups, 0)
    codes = torch.empty_like(norms, dtype=torch.uint8)
    ranges = torch.empty(groups, 2, dtype=torch.float16, device=norms.device)
    at_once = per_program(tokens, NORMS)
    # Without fusion, as the reference computes.
    log_norms[(groups,)](
        norms,
        codes,
        ranges,
        broken,
        tokens,
        NORMS=at_once,
        num_warps=1 if at_once <= 64 else 4,
        enable_fp_fusion=False,
    )
    return codes, ranges
