"""Means of groups: what the vectors of one head in one segment share, stored once and subtracted before coding.

Keys share a mean within a page also behind rotary embeddings, where the whole layer has none to speak of. A mean is
eight-bit integers and one power of two, in the codes' rotated space, where no channel stands out. What is subtracted is
the mean as it is stored: its rounding costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fibkv.constants import constant

LIMIT = 127
# Powers of two that float32 holds exactly together with any integer up to LIMIT.
MIN_EXPONENT, MAX_EXPONENT = -126, 120


def encode_means(mean: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Codes the means of groups.

    Args:
        mean: ``[..., d]`` float64, finite.
        rotation: ``[d, d]``, from vectors to the codes' space.

    Returns:
        The codes ``[..., 1 + d]`` int8 as in `fibkv.codes.FibCodes`, and what they take from each vector of their
        group: `means_in_place` of them.
    """
    codes = _encode(mean @ constant(rotation, mean.device, torch.float64).T)
    return codes, means_in_place(codes, rotation)


def subtract_means(rows: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Codes the means of groups of rows ``[..., T, d]`` float32, finite, and takes them out.

    Returns:
        The codes as of `encode_means`, and the rows without the means ``[..., T, d]`` float32.
    """
    codes, taken = encode_means(rows.to(torch.float64).mean(-2), rotation)
    return codes, rows - taken.unsqueeze(-2)


def decode_means(codes: Tensor) -> Tensor:
    """Means ``[..., d]`` float32, exact, in the codes' space, of ``[..., 1 + d]`` int8."""
    return _decode(codes).to(torch.float32)


def means_in_place(codes: Tensor, rotation: Tensor) -> Tensor:
    """Means ``[..., d]`` float32 in the space of the vectors."""
    return (_decode(codes) @ constant(rotation, codes.device, torch.float64)).to(torch.float32)


def _encode(mean: Tensor) -> Tensor:
    peak = mean.abs().amax(-1, keepdim=True)
    exponent = torch.frexp(peak / LIMIT).exponent.clamp(MIN_EXPONENT, MAX_EXPONENT)
    numbers = (mean / _power(exponent)).round().clamp(-LIMIT, LIMIT)
    # One form for a mean that rounds to zero.
    exponent = exponent * (numbers != 0).any(-1, keepdim=True)
    return torch.cat([exponent, numbers], -1).to(torch.int8)


def _decode(codes: Tensor) -> Tensor:
    return codes[..., 1:].to(torch.float64) * _power(codes[..., :1])


def _power(exponent: Tensor) -> Tensor:
    """2 ** exponent, exactly: float64 by its bits."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
