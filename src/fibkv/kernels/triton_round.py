"""Triton: the kernel that rounds to 8-bit numbers, and its launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fibkv.codes import ScaledCodes
from fibkv.kernels.triton_load import INTERPRETED, load_floats
from fibkv.kernels.triton_sides import FLOATS, FORMS, octets, per_program, power_of_two
from fibkv.tables import ScaledTables

# Numbers that one program rounds; the interpreter pays per program.
TILE = 1 << 20 if INTERPRETED else 1 << 13
# A float32 of this size has no fraction: adding and subtracting it rounds smaller ones to even.
WHOLE = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def _round_up_bfloat16(positive):
    """Bits of float32 >= 0 as bfloat16, rounded towards +infinity, finite where they were: int32."""
    raised = (positive.to(tl.int32, bitcast=True) + 0xFFFF) >> 16
    return tl.minimum(raised, 0x7F7F)


@triton.jit
def _round_to_e4m3(numbers):
    """Bits of float32 as e4m3, rounded to even; magnitudes are at most 448."""
    bits = numbers.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Rounded at the third place of the mantissa; exponents are biased by 120 less.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes are multiples of 2^-9.
    small = ((magnitude.to(tl.float32, bitcast=True) * 512.0 + WHOLE) - WHOLE).to(tl.int32)
    return tl.where(magnitude < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)


@triton.jit
def _round(
    rows,
    values,
    scales,
    refused,
    count,
    LIMIT: tl.constexpr,
    SOURCE: tl.constexpr,
    FORM: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """``rows [count, DIM]`` to ``values`` (bytes of int8 or e4m3) and ``scales [count]`` (bits of bfloat16).

    ``rows`` are of a form SOURCE of `load_floats`; ``refused [1]`` (a byte) is set where a number is not finite.
    """
    vectors = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    axis = tl.arange(0, D)
    mask = (vectors < count)[:, None] & (axis < DIM)[None, :]
    offsets = vectors[:, None] * DIM + axis[None, :]
    numbers = load_floats(rows, offsets, mask, SOURCE)
    # As integers, magnitudes keep their order, and NaN is beyond infinity.
    highest = tl.max(numbers.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    tl.store(refused + vectors * 0, 1, highest >= 0x7F800000)
    peaks = highest.to(tl.float32, bitcast=True)
    stored = _round_up_bfloat16(tl.div_rn(peaks, tl.full([VECTORS], LIMIT, tl.float32)))
    divisors = (stored << 16).to(tl.float32, bitcast=True)
    divisors = tl.where(divisors == 0.0, 1.0, divisors)
    scaled = tl.div_rn(numbers, tl.broadcast_to(divisors[:, None], [VECTORS, D]))
    if FORM == "int8":
        codes = tl.clamp((scaled + WHOLE) - WHOLE, -LIMIT, LIMIT).to(tl.int32)
    else:
        codes = _round_to_e4m3(tl.clamp(scaled, -LIMIT, LIMIT))
    tl.store(values + offsets, (codes & 0xFF).to(tl.uint8), mask)
    tl.store(scales + vectors, stored.to(tl.int16), vectors < count)


def round_to_eights(rows: Tensor, tables: ScaledTables, refused: Tensor) -> ScaledCodes:
    """Codes of rows ``[..., d]`` of any floating dtype; ``refused []`` bool is set where a number is not finite."""
    if rows.dtype not in FLOATS:
        rows = rows.to(torch.float32)
    rows = rows.contiguous()
    dim = rows.shape[-1]
    values = torch.empty(rows.shape, dtype=tables.dtype, device=rows.device)
    scales = torch.empty(rows.shape[:-1], dtype=torch.bfloat16, device=rows.device)
    width = power_of_two(dim)
    vectors = per_program(scales.numel(), TILE // width)
    _round[(triton.cdiv(scales.numel(), vectors),)](
        octets(rows),
        values.view(torch.uint8),
        scales.view(torch.int16),
        refused.view(torch.uint8),
        scales.numel(),
        LIMIT=tables.limit,
        SOURCE=FORMS[rows.dtype],
        FORM=FORMS[tables.dtype],
        DIM=dim,
        D=width,
        VECTORS=vectors,
        enable_fp_fusion=False,
    )
    return ScaledCodes(scales=scales, values=values)
