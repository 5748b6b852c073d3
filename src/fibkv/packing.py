"""Packing of fixed-width indices into bytes: the canonical bit order of fibkv.

Index ``m`` of a vector occupies bits ``m * bits`` to ``(m + 1) * bits - 1`` of a little-endian bit stream,
lowest bit first; the last byte is filled with zero bits. So block ``m`` stands at a computable address.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_nbytes(count: int, bits: int) -> int:
    """Bytes that ``count`` indices of ``bits`` bits take: ceil(count * bits / 8)."""
    return (count * bits + 7) // 8


def pack(indices: Tensor, bits: int) -> Tensor:
    """Packs indices.

    Args:
        indices: ``[..., m]`` integers in 0..2**bits - 1.
        bits: width of one index, 1..20.

    Returns:
        ``[..., packed_nbytes(m, bits)]`` uint8, newly allocated.
    """
    if bits == 8:
        return indices.to(torch.uint8)
    shifts = torch.arange(bits, device=indices.device, dtype=torch.int32)
    return octets(((indices.to(torch.int32).unsqueeze(-1) >> shifts) & 1).to(torch.uint8).flatten(-2))


def octets(stream: Tensor) -> Tensor:
    """Bits ``[..., n]`` of 0 and 1 as bytes ``[..., ceil(n / 8)]`` uint8, the lowest bit first."""
    filled: Tensor = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8)).unflatten(-1, (-1, 8))
    weights = 1 << torch.arange(8, device=stream.device, dtype=torch.int32)
    return (filled * weights).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """The inverse of `pack`.

    Args:
        packed: ``[..., packed_nbytes(count, bits)]`` uint8.
        count: number of indices per vector.
        bits: width of one index, 1..20.

    Returns:
        ``[..., count]`` int32.
    """
    if bits == 8:
        return packed.to(torch.int32)
    starts = torch.arange(count, device=packed.device) * bits
    first = starts // 8
    # An index touches at most four bytes: 7 bits of offset and 20 of its own are 27.
    spread = (7 + bits + 7) // 8
    padded = torch.nn.functional.pad(packed, (0, spread)).to(torch.int32)
    window = torch.zeros(*packed.shape[:-1], count, dtype=torch.int32, device=packed.device)
    for byte in range(spread):
        window |= padded[..., first + byte] << (8 * byte)
    return (window >> (starts % 8).to(torch.int32)) & ((1 << bits) - 1)


def stray_bits(packed: Tensor, count: int, bits: int) -> bool:
    """Whether the filling behind the last index holds a bit that is not zero (then the bytes are not canonical)."""
    used = (count * bits) % 8
    return used != 0 and bool((packed[..., -1] >> used).any())
