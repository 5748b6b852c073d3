"""Encoding and decoding on Triton: the functions of `fibkv.kernels.reference`, same meaning, on the codes' device.

What is not a kernel here is torch's: trellis and affine codes, channel scales, means of groups. On the same rotated
vectors codes are the reference's bit for bit; float64 products on another device may round one rotated coordinate in
10^8 differently. Decoded vectors agree to 1e-5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fibkv.codes import ChannelCodes, Codes, FibCodes
from fibkv.errors import EncodingError
from fibkv.kernels import reference
from fibkv.kernels.refusals import mismatch, refuse_if
from fibkv.kernels.triton_decode import decode_vectors
from fibkv.kernels.triton_fib import encode_fib
from fibkv.kernels.triton_round import round_to_eights
from fibkv.kernels.triton_sides import on_device
from fibkv.means import decode_means
from fibkv.tables import AffineTables, ChannelTables, FibTables, KltTables, RawTables, ScaledTables, Tables, trellis_of


def encode(rows: Tensor, tables: Tables) -> Codes:
    """Encodes vectors ``[..., T, d]``; see `fibkv.kernels.reference.encode`.

    Raises:
        EncodingError: a vector is not finite, or its norm or scale is out of the format's range.
    """
    if isinstance(tables, AffineTables | KltTables | RawTables) or trellis_of(tables):
        # There is no kernel for grids, paths, widths and copies; torch's code runs on any device.
        return reference.encode(rows, tables)
    if isinstance(tables, ChannelTables):
        scales, divided = reference.divide_channels(rows)
        return ChannelCodes(channel_scales=scales, inner=encode(divided, tables.inner))
    refused = torch.zeros((), dtype=torch.bool, device=rows.device)
    codes = _launch(rows, tables, refused)
    refuse_if(refused, lambda: _refusal(rows, tables))
    return codes


def _launch(rows: Tensor, tables: ScaledTables | FibTables, refused: Tensor) -> Codes:
    if isinstance(tables, ScaledTables):
        return round_to_eights(rows, tables, refused)
    return encode_fib(rows, tables, refused)


def _refusal(rows: Tensor, tables: Tables) -> EncodingError:
    """What the reference says of rows that a kernel refused."""
    try:
        reference.encode(rows, tables)
    except EncodingError as error:
        return error
    return EncodingError("a norm is within rounding of the largest that can be stored")


def decode(codes: Codes, tables: Tables, *, out: Tensor | None = None) -> Tensor:
    """Decodes to ``[..., T, d]`` in the original space; see `fibkv.kernels.reference.decode`."""
    vectors = _decode(codes, tables)
    if out is None:
        return vectors
    return out.copy_(vectors) if isinstance(tables, RawTables) else reference.copy_vectors(vectors, out)


def _decode(codes: Codes, tables: Tables) -> Tensor:
    if isinstance(tables, ChannelTables):
        if not isinstance(codes, ChannelCodes):
            raise mismatch(codes, tables)
        return _decode(codes.inner, tables.inner) * codes.channel_scales.unsqueeze(-2).to(torch.float32)
    if isinstance(tables, KltTables):
        return reference.decode(codes, tables)
    device_tables = on_device(tables, codes.device)
    vectors = decode_vectors(codes, tables, device_tables)
    if isinstance(codes, FibCodes) and codes.mean.numel():
        vectors += decode_means(codes.mean).unsqueeze(-2)
    return device_tables.back(vectors)
