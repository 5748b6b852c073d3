"""Encoding and decoding on Triton: the functions of `fibkv.kernels.reference`, same meaning, on the codes' device.

Norms and rotations are torch's, in float64; the search for codewords, 8-bit numbers and decoding are kernels
(`triton_encode.py`, `triton_decode.py`). On the same rotated vectors codes are the reference's bit for bit; float64
products on another device may round one rotated coordinate in 10^8 differently. Decoded vectors agree to 1e-5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fibkv.codes import ChannelCodes, Codes, FibCodes, ScaledCodes
from fibkv.kernels import reference
from fibkv.kernels.refusals import mismatch, require_finite
from fibkv.kernels.triton_decode import decode_vectors
from fibkv.kernels.triton_encode import nearest_codewords, round_to_eights
from fibkv.kernels.triton_sides import DeviceTables, on_device
from fibkv.means import decode_means, subtract_means
from fibkv.tables import AffineTables, ChannelTables, FibTables, KltTables, RawTables, ScaledTables, Tables, trellis_of

# Vectors rotated at a time: their float64 copies stay below 128 MiB at d = 128.
ROTATED_AT_ONCE = 1 << 16


def encode(rows: Tensor, tables: Tables) -> Codes:
    """Encodes vectors ``[..., T, d]``; see `fibkv.kernels.reference.encode`.

    Raises:
        EncodingError: a vector is not finite, or its norm or scale is out of the format's range.
    """
    if isinstance(tables, AffineTables | KltTables) or trellis_of(tables):
        # There is no kernel for grids, paths and widths; torch's code runs on any device.
        return reference.encode(rows, tables)
    match tables:
        case RawTables():
            # A copy: torch makes it at the speed of memory.
            return reference.encode(rows, tables)
        case ScaledTables():
            require_finite(rows)
            values, scales = round_to_eights(rows.to(torch.float32).contiguous(), tables)
            return ScaledCodes(scales=scales, values=values)
        case FibTables():
            return _encode_fib(rows, tables)
        case ChannelTables():
            scales, divided = reference.divide_channels(rows)
            return ChannelCodes(channel_scales=scales, inner=encode(divided, tables.inner))


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


def _encode_fib(rows: Tensor, tables: FibTables) -> FibCodes:
    require_finite(rows)
    device_tables = on_device(tables, rows.device)
    mean = torch.empty((*rows.shape[:-2], 0), dtype=torch.int8, device=rows.device)
    if tables.centered:
        mean, rows = subtract_means(rows, tables.rotation.matrix)
    parts = rows.reshape(-1, rows.shape[-1]).split(ROTATED_AT_ONCE)
    norms, indices = zip(*(_encode_vectors(part, tables, device_tables) for part in parts), strict=True)
    packed_norms, norm_range = reference.encode_norms(torch.cat(norms).view(rows.shape[:-1]), tables.norm_format)
    packed = torch.cat(indices)
    return FibCodes(
        mean=mean,
        norm_range=norm_range,
        norms=packed_norms,
        indices=packed.view(*rows.shape[:-1], packed.shape[-1]),
    )


def _encode_vectors(rows: Tensor, tables: FibTables, device_tables: DeviceTables) -> tuple[Tensor, Tensor]:
    """Norms ``[V]`` float64 and packed indices ``[V, bytes]`` of rows ``[V, d]``."""
    # As the reference does it: float64 before what decides a code, rounded once.
    wide = rows.to(torch.float32).to(torch.float64)
    norms = wide.square().sum(-1).sqrt()
    unit = wide / norms.masked_fill(norms == 0, 1.0).unsqueeze(-1)
    rotated = device_tables.turned(unit).to(torch.float32)
    indices, gains = nearest_codewords(rotated, tables, device_tables)
    return (norms * gains if tables.gain_corrected else norms), indices
