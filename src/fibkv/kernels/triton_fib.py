"""FibQuant on Triton: from vectors to codes by a few launches, none of which waits for another on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fibkv.codes import FibCodes
from fibkv.kernels.triton_encode import nearest_codewords
from fibkv.kernels.triton_means import coded_means
from fibkv.kernels.triton_rotate import stored_norms, unit_vectors
from fibkv.kernels.triton_search import search
from fibkv.kernels.triton_sides import FLOATS, DeviceTables, on_device
from fibkv.packing import packed_nbytes
from fibkv.tables import FibTables

# Vectors that are rotated at a time: 32 MiB of float32 at d = 128, which stay in the cache of a large device.
ROTATED_AT_ONCE = 1 << 16


def encode_fib(rows: Tensor, tables: FibTables, refused: Tensor) -> FibCodes:
    """Encodes vectors.

    Args:
        rows: ``[..., T, d]`` of any floating dtype.
        tables: of a codec without a trellis.
        refused: ``[]`` bool, set where a vector is not finite or its norm out of the format's range.
    """
    device_tables = on_device(tables, rows.device)
    leading, tokens = rows.shape[:-2], rows.shape[-2]
    narrow = rows if rows.dtype in FLOATS else rows.to(torch.float32)
    groups = narrow.reshape(-1, *rows.shape[-2:]).contiguous()
    mean = torch.empty(len(groups), 0, dtype=torch.int8, device=rows.device)
    if tables.centered:
        mean, taken = coded_means(groups, device_tables)
        # As float32, whatever they are.
        groups = groups - taken.unsqueeze(1)
    nbytes = packed_nbytes(tables.num_blocks, tables.bits)
    packed = torch.empty(*groups.shape[:-1], nbytes, dtype=torch.uint8, device=rows.device)
    norms = torch.empty(groups.shape[:-1], dtype=torch.float64, device=rows.device)
    at_once = max(1, ROTATED_AT_ONCE // tokens)
    for start in range(0, len(groups), at_once):
        part = slice(start, start + at_once)
        rotated, lengths = unit_vectors(groups[part], device_tables, refused)
        _search(rotated, lengths, tables, device_tables, packed[part].view(-1, nbytes), norms[part].view(-1))
    codes, ranges = stored_norms(norms, tables.norm_format, refused)
    return FibCodes(
        mean=mean.view(*leading, mean.shape[-1]),
        norm_range=ranges.view(*leading, ranges.shape[-1]),
        norms=codes.view(*leading, tokens),
        indices=packed.view(*leading, tokens, nbytes),
    )


def _search(
    rotated: Tensor, lengths: Tensor, tables: FibTables, device_tables: DeviceTables, packed: Tensor, norms: Tensor
) -> None:
    if device_tables.candidates is not None:
        search(rotated, lengths, tables, device_tables, packed, norms)
        return
    found, gains = nearest_codewords(rotated, tables, device_tables)
    packed.copy_(found)
    torch.mul(lengths, gains, out=norms) if tables.gain_corrected else norms.copy_(lengths)
