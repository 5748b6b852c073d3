"""Triton: the kernel that decodes vectors, and its launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fibkv.codes import Codes
from fibkv.kernels.triton_load import INTERPRETED, load_directions, load_norms
from fibkv.kernels.triton_sides import DeviceTables, Side, arrays, octets, per_program
from fibkv.tables import FibTables, RawTables, ScaledTables

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
    NORM: tl.constexpr,
    FORM: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    NBYTES: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """``out [count, DIM]`` float32 in the codes' space; ``tokens`` vectors share a norm range."""
    vectors = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    mask = vectors < count
    directions = load_directions(codes, codewords, vectors, mask, FORM, DIM, D, NBYTES, BITS, BLOCK)
    scaled = directions.to(tl.float32) * load_norms(norms, ranges, vectors, vectors // tokens, mask, NORM)[:, None]
    axis = tl.arange(0, D)
    tl.store(out + vectors[:, None] * DIM + axis[None, :], scaled, mask[:, None] & (axis < DIM)[None, :])


def decode_vectors(codes: Codes, tables: RawTables | ScaledTables | FibTables, device_tables: DeviceTables) -> Tensor:
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
            NORM=side.norm,
            VECTORS=vectors,
            enable_fp_fusion=True,
            **side.constants(),
        )
    return out
