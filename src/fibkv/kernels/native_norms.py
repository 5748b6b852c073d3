"""8-bit log norms in C++ (`csrc/encode_norms.h`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fibkv.codes import FibCodes
from fibkv.kernels.native_sides import extension as native
from fibkv.kernels.refusals import require_norms


def encode(norms: Tensor, isa: Any) -> tuple[Tensor, Tensor]:
    """Codes and ranges of norms ``[..., T]`` float64 >= 0, contiguous; see `fibkv.codes.FibCodes`.

    Raises:
        EncodingError: a norm is beyond float32.
    """
    codes = torch.empty(norms.shape, dtype=torch.uint8)
    ranges = torch.empty((*norms.shape[:-1], 2), dtype=torch.float16)
    held = native.encode_norms(
        norms.data_ptr(),
        groups=ranges.numel() // 2,
        tokens=norms.shape[-1],
        codes=codes.data_ptr(),
        ranges=ranges.data_ptr(),
        threads=torch.get_num_threads(),
        isa=isa,
    )
    if not held:
        require_norms(norms, "log8")
    return codes, ranges


def decode(codes: FibCodes, isa: Any) -> Tensor:
    """Norms ``[..., T]`` float32, contiguous, in either format; the codes are contiguous too."""
    if codes.norms.dtype == torch.float16:
        return codes.norms.to(torch.float32)
    norms = torch.empty(codes.norms.shape, dtype=torch.float32)
    native.decode_norms(
        codes.norms.data_ptr(),
        codes.norm_range.data_ptr(),
        groups=codes.norm_range.numel() // 2,
        tokens=norms.shape[-1],
        norms=norms.data_ptr(),
        threads=torch.get_num_threads(),
        isa=isa,
    )
    return norms
