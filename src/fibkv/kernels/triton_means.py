"""Triton: the kernels that take the means of groups and code them (`fibkv.means`), and their launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fibkv.kernels.triton_load import INTERPRETED, load_floats
from fibkv.kernels.triton_rotate import WHOLE
from fibkv.kernels.triton_sides import FORMS, DeviceTables, octets, per_program
from fibkv.means import LIMIT, MAX_EXPONENT, MIN_EXPONENT

# Tokens that a program adds up at a time, and groups whose means it codes: the least rows that a matrix unit takes.
TOKENS = 1 << 6
GROUPS = 1 << 10 if INTERPRETED else 1 << 4
# Of the product with a rotation, coordinates at a time.
COORDINATES = 1 << 5


@triton.jit
def group_means(rows, means, tokens, FORM: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr):
    """``means [groups, D]`` float64 of ``rows [groups, tokens, DIM]`` of a form of `load_floats`, 0 from DIM upwards.

    A coordinate that is not finite in a vector has mean 0.
    """
    group = tl.program_id(0).to(tl.int64)
    axis = tl.arange(0, D)
    total = tl.zeros([D], tl.float64)
    for first in range(0, tokens, TOKENS):
        part = first + tl.arange(0, TOKENS)
        inside = (part < tokens)[:, None] & (axis < DIM)[None, :]
        numbers = load_floats(rows, (group * tokens + part)[:, None] * DIM + axis[None, :], inside, FORM)
        total += tl.sum(tl.where(tl.abs(numbers) < float("inf"), numbers, 0.0).to(tl.float64), 0)
    tl.store(means + group * D + axis, total / tokens.to(tl.float64))


@triton.jit
def code_means(
    means,
    matrix,
    codes,
    taken,
    groups,
    LIMIT: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    COORDINATES: tl.constexpr,
):
    """``means [groups, D]`` float64 to ``codes [groups, 1 + DIM]`` int8 and ``taken [groups, DIM]`` float32.

    ``matrix [D, D]`` float32 is the transposed rotation, filled up with zeros; powers of two are in LEAST..MOST.
    """
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    mask = group < groups
    axis = tl.arange(0, D)
    turned = tl.zeros([GROUPS, D], tl.float64)
    for first in range(0, D, COORDINATES):
        part = first + tl.arange(0, COORDINATES)
        some = tl.load(means + group[:, None] * D + part[None, :], mask[:, None], other=0.0)
        turning = tl.load(matrix + part[:, None] * D + axis[None, :]).to(tl.float64)
        turned = tl.dot(some, turning, turned, out_dtype=tl.float64)
    peak = tl.max(tl.abs(turned), 1) / LIMIT
    exponent = ((peak.to(tl.int64, bitcast=True) >> 52) & 0x7FF).to(tl.int32) - 1022
    exponent = tl.minimum(tl.maximum(exponent, LEAST), MOST)
    inverse = ((1023 - exponent).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    numbers = (turned * inverse[:, None] + WHOLE) - WHOLE
    numbers = tl.minimum(tl.maximum(numbers, -LIMIT), LIMIT)
    # One form for a mean that rounds to zero.
    exponent = tl.where(tl.max(tl.abs(numbers), 1) == 0.0, 0, exponent)
    tl.store(codes + group * (DIM + 1), exponent.to(tl.int8), mask)
    inside = mask[:, None] & (axis < DIM)[None, :]
    tl.store(codes + group[:, None] * (DIM + 1) + 1 + axis[None, :], numbers.to(tl.int32).to(tl.int8), inside)
    power = ((exponent + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    decoded = numbers * power[:, None]
    for first in range(0, D, COORDINATES):
        part = first + tl.arange(0, COORDINATES)
        back = tl.load(matrix + part[None, :] * D + axis[:, None]).to(tl.float64)
        found = tl.dot(decoded, back, out_dtype=tl.float64).to(tl.float32)
        places = taken + group[:, None] * DIM + part[None, :]
        tl.store(places, found, mask[:, None] & (part < DIM)[None, :])


def coded_means(rows: Tensor, device_tables: DeviceTables) -> tuple[Tensor, Tensor]:
    """Codes the means of groups.

    Args:
        rows: ``[groups, T, d]``, contiguous, of a dtype of `triton_sides.FLOATS`.
        device_tables: of the codec, on the rows' device.

    Returns:
        ``[groups, 1 + d]`` int8 as in `fibkv.codes.FibCodes`, and what vectors of each group lose, ``[groups, d]``
        float32.
    """
    groups, tokens, dim = rows.shape
    width = device_tables.turning.shape[0]
    means = torch.empty(groups, width, dtype=torch.float64, device=rows.device)
    sizes = {"DIM": dim, "D": width}
    group_means[(groups,)](
        octets(rows), means, tokens, FORM=FORMS[rows.dtype], TOKENS=per_program(tokens, TOKENS), **sizes
    )
    codes = torch.empty(groups, 1 + dim, dtype=torch.int8, device=rows.device)
    taken = torch.empty(groups, dim, device=rows.device)
    together = max(16, per_program(groups, GROUPS))
    code_means[(triton.cdiv(groups, together),)](
        means,
        device_tables.turning,
        codes,
        taken,
        groups,
        LIMIT=float(LIMIT),
        LEAST=MIN_EXPONENT,
        MOST=MAX_EXPONENT,
        GROUPS=together,
        COORDINATES=COORDINATES,
        **sizes,
        num_stages=2,
        enable_fp_fusion=False,
    )
    return codes, taken
