"""klt codes in C++ (`csrc/encode_klt.h`): the functions of `fibkv.kernels.reference_klt`, same codes bit for bit."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fibkv.allocation import PAIR_LEVELS
from fibkv.codes import FibCodes
from fibkv.kernels import native_norms
from fibkv.kernels.native_sides import extension as native
from fibkv.kernels.reference_klt import require_heads
from fibkv.kernels.refusals import require_finite
from fibkv.tables import KltTables, start_of


def encode(rows: Tensor, element: Any, tables: KltTables, isa: Any) -> FibCodes:
    """Encodes contiguous rows ``[..., H, T, d]`` of an element type; see `fibkv.kernels.native_codes.encode`."""
    require_heads(rows.shape, tables)
    norms = torch.empty(rows.shape[:-1], dtype=torch.float64)
    indices = torch.empty((*norms.shape, tables.code_nbytes), dtype=torch.uint8)
    finite = native.encode_klt(
        _coder(tables),
        rows.data_ptr(),
        element,
        groups=norms.numel() // norms.shape[-1],
        tokens=norms.shape[-1],
        codes=indices.data_ptr(),
        norms=norms.data_ptr(),
        threads=torch.get_num_threads(),
        isa=isa,
    )
    if not finite:
        require_finite(rows)
    codes, norm_range = native_norms.encode(norms, isa)
    mean = torch.empty((*rows.shape[:-2], 0), dtype=torch.int8)
    return FibCodes(mean=mean, norm_range=norm_range, norms=codes, indices=indices)


def decode_into(out: Tensor, element: Any, codes: FibCodes, tables: KltTables, isa: Any) -> None:
    """Decodes contiguous codes into contiguous ``out [..., H, T, d]`` of an element type."""
    require_heads(codes.indices.shape, tables)
    norms = native_norms.decode(codes, isa)
    native.decode_klt(
        _coder(tables),
        codes.indices.data_ptr(),
        norms.data_ptr(),
        groups=norms.numel() // norms.shape[-1],
        tokens=norms.shape[-1],
        out=out.data_ptr(),
        element=element,
        threads=torch.get_num_threads(),
        isa=isa,
    )


# Every layer of a calibrated model has a coder of its own, which is small: what it searches in is shared.
@lru_cache(maxsize=512)
def _coder(tables: KltTables) -> Any:
    # Held by names until the constructor has copied them.
    widths, weights = tables.bits.contiguous(), tables.weights.to(torch.float64).contiguous()
    levels = [_level(tables.codewords, bits, tables.head_dim, tables.scales) for bits in PAIR_LEVELS[1:]]
    scales = list(tables.scales)
    return native.KltCoder(tables.head_dim, tables.heads, widths.data_ptr(), weights.data_ptr(), *levels, scales)


@lru_cache(maxsize=64)
def _level(codewords: Tensor, bits: int, dim: int, scales: tuple[float, ...]) -> Any:
    """What pairs with so many bits are searched in."""
    start = start_of(bits)
    book = codewords[start : start + (1 << bits)].contiguous()
    turn = torch.eye(2)
    return native.FibCoder(
        dim=2,
        block=2,
        size=len(book),
        bits=bits,
        gain_corrected=True,
        codewords=book.data_ptr(),
        matrix=turn.data_ptr(),
        signs=0,
        rounds=0,
        decisions=0,
        side=0,
        extent=0.0,
        scales=list(scales),
        # All that a vector has, in one coordinate.
        farthest=dim**0.5,
    )
