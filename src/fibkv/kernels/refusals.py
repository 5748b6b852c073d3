"""What every implementation of the kernels refuses, in the same words."""

from __future__ import annotations

import torch
from torch import Tensor

from fibkv.codes import Codes
from fibkv.errors import EncodingError, KernelError
from fibkv.tables import Tables

FLOAT16_MAX = 65504.0
FLOAT32_MAX = 3.4028234663852886e38


def require_finite(rows: Tensor) -> None:
    """Refuses rows with an element that is NaN or infinite.

    Raises:
        EncodingError: with the number of such elements.
    """
    finite = torch.isfinite(rows)
    if not bool(finite.all()):
        count = int((~finite).sum())
        raise EncodingError(f"vectors must be finite, got {count} NaN or infinite of {rows.numel()} elements")


def require_norms(norms: Tensor, norm_format: str) -> None:
    """Refuses norms ``[...]`` float64 that their stored form cannot hold.

    Raises:
        EncodingError: with the bound and the largest norm.
    """
    top = float(norms.max()) if norms.numel() else 0.0
    if norm_format == "f16" and top > FLOAT16_MAX:
        raise EncodingError(f"norms must be at most {FLOAT16_MAX:g} to be stored as float16, got {top:.6g}")
    if top > FLOAT32_MAX:
        raise EncodingError(f"norms must be finite in float32, got {top:.6g}")


def mismatch(codes: Codes, tables: Tables) -> KernelError:
    """The error of codes that meet the tables of another codec."""
    return KernelError(f"{type(codes).__name__} cannot be read with {type(tables).__name__}")
