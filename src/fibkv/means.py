"""Means of groups: what the vectors of one head in one segment share, stored once and subtracted before coding.

Keys share a mean within a page also behind rotary embeddings, where the whole layer has none to speak of. A mean is
eight-bit integers and one power of two, in the codes' rotated space, where no channel stands out. What is subtracted is
the mean as it is stored: its rounding costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

LIMIT = 127
# Powers of two that float32 holds exactly together with any integer up to LIMIT.
MIN_EXPONENT, MAX_EXPONENT = -126, 120


def subtract_means(rows: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Codes the means of groups, and takes them out.

    Args:
        rows: ``[..., T, d]`` finite, of any floating dtype.
        rotation: ``[d, d]``, from vectors to the codes' space.

    Returns:
        The means ``[..., 1 + d]`` int8 as in `fibkv.codes.FibCodes`, and the rows without them ``[..., T, d]`` float32.
    """
    wide = rotation.to(rows.device, torch.float64)
    mean = rows.sum(-2, dtype=torch.float64) / rows.shape[-2]
    codes = _encode(mean @ wide.T)
    taken = (_decode(codes) @ wide).to(torch.float32)
    return codes, rows.to(torch.float32) - taken.unsqueeze(-2)


def decode_means(codes: Tensor) -> Tensor:
    """Means ``[..., d]`` float32, exact, in the codes' space, of ``[..., 1 + d]`` int8."""
    return _decode(codes).to(torch.float32)


def means_in_place(codes: Tensor, rotation: Tensor) -> Tensor:
    """Means ``[..., d]`` float32 in the space of the vectors."""
    return (_decode(codes) @ rotation.to(codes.device, torch.float64)).to(torch.float32)


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
