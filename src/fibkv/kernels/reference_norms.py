"""Norms in plain torch: 8-bit logarithms in a range of their own, or float16. Part of the reference kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fibkv.kernels.refusals import require_norms

# Steps of an 8-bit log norm: code 0 is the zero vector, codes 1..255 the norms.
LOG_STEPS = 254


def encode_norms(norms: Tensor, norm_format: str) -> tuple[Tensor, Tensor]:
    """Norms ``[..., T]`` float64 >= 0 to (codes, range): see `FibCodes`.

    Raises:
        EncodingError: a norm that the format cannot hold.
    """
    require_norms(norms, norm_format)
    if norm_format == "f16":
        return norms.to(torch.float16), norms.new_empty((*norms.shape[:-1], 0), dtype=torch.float16)
    return _encode_log_norms(norms)


def _encode_log_norms(norms: Tensor) -> tuple[Tensor, Tensor]:
    zero = norms == 0
    logs = norms.masked_fill(zero, 1.0).log2()
    low = logs.masked_fill(zero, torch.inf).amin(-1)
    high = logs.masked_fill(zero, -torch.inf).amax(-1)
    empty = zero.all(-1)
    # Both numbers are rounded outwards to steps that float16 holds exactly over the whole range of float32 norms.
    low = torch.floor(low.masked_fill(empty, 0.0) * 8) / 8
    step = torch.ceil((high.masked_fill(empty, 0.0) - low) / LOG_STEPS * 1024).clamp(min=1) / 1024
    codes = ((logs - low.unsqueeze(-1)) / step.unsqueeze(-1)).round().clamp(0, LOG_STEPS) + 1
    return codes.masked_fill(zero, 0).to(torch.uint8), torch.stack([low, step], -1).to(torch.float16)


def decode_norms(norms: Tensor, norm_range: Tensor) -> Tensor:
    """Norms ``[..., T]`` float32 of `FibCodes` in either format."""
    if norms.dtype == torch.float16:
        return norms.to(torch.float32)
    low, step = norm_range.to(torch.float32).unsqueeze(-2).unbind(-1)
    values = torch.exp2(low + (norms.to(torch.float32) - 1) * step)
    return values.masked_fill(norms == 0, 0.0)
