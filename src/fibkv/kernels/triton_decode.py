"""Triton: the kernel that decodes vectors, and its launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fibkv.codes import Codes
from fibkv.kernels.triton_load import INTERPRETED, load_directions, load_norms
from fibkv.kernels.triton_sides import DeviceTables, Side, arrays, octets, per_program
from fibkv.tables import PlainTables

# Numbers that one program decodes; the interpreter pays per program.
TILE = 1 << 20 if INTERPRETED else 1 << 12


@triton.jit
def _decode(
    codes,
    norms,
    ranges,
    codewords,
    out,
    count,
    tokens,
    SIDE: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """``out [count, d]`` float32 in the codes' space; ``tokens`` vectors share a norm range."""
    vectors = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    mask = vectors < count
    groups = vectors // tokens
    directions = load_directions(codes, norms, codewords, vectors, groups, mask, SIDE)
    scaled = directions.to(tl.float32) * load_norms(norms, ranges, vectors, groups, mask, SIDE)[:, None]
    axis = tl.arange(0, SIDE.width)
    tl.store(out + vectors[:, None] * SIDE.dim + axis[None, :], scaled, mask[:, None] & (axis < SIDE.dim)[None, :])


def decode_vectors(codes: Codes, tables: PlainTables, device_tables: DeviceTables) -> Tensor:
    """Decodes to ``[..., T, d]`` float32 in the codes' own space.

    Raises:
        KernelError: codes of another codec.
    """
    data, norms, ranges = arrays(codes, tables)
    side = Side.of(tables)
    out = torch.empty((*codes.axes, side.dim), device=data.device)
    count = codes.axes.numel()
    if count:
        vectors = per_program(count, TILE // side.width)
        _decode[(triton.cdiv(count, vectors),)](
            octets(data),
            octets(norms),
            octets(ranges),
            device_tables.codewords,
            out,
            count,
            codes.axes[-1],
            SIDE=side,
            VECTORS=vectors,
            enable_fp_fusion=True,
        )
    return out
