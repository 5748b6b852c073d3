"""8-bit log norms in C++ (`csrc/log_norms.h`)."""

from __future__ import annotations

import torch
from torch import Tensor

from fibkv.codes import FibCodes
from fibkv.kernels.native_sides import extension as native


def encode(norms: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and ranges of norms ``[..., T]`` float64, contiguous, that are in range; see `fibkv.codes.FibCodes`."""
    codes = torch.empty(norms.shape, dtype=torch.uint8)
    ranges = torch.empty((*norms.shape[:-1], 2), dtype=torch.float64)
    native.encode_norms(
        norms.data_ptr(),
        groups=ranges.numel() // 2,
        tokens=norms.shape[-1],
        codes=codes.data_ptr(),
        ranges=ranges.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return codes, ranges.to(torch.float16)


def decode(codes: FibCodes) -> Tensor:
    """Norms ``[..., T]`` float32, contiguous, in either format."""
    if codes.norms.dtype == torch.float16:
        return codes.norms.to(torch.float32)
    norms = torch.empty(codes.norms.shape, dtype=torch.float32)
    # Held by a name: the kernel has only its address.
    ranges = codes.norm_range.to(torch.float32)
    native.decode_norms(
        codes.norms.data_ptr(),
        ranges.data_ptr(),
        groups=ranges.numel() // 2,
        tokens=norms.shape[-1],
        norms=norms.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return norms
