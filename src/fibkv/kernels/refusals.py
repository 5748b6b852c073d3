"""What every implementation of the kernels refuses, in the same words; at once, or where nobody may wait, later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from fibkv.codes import Codes
from fibkv.errors import EncodingError, KernelError
from fibkv.tables import Tables

FLOAT16_MAX = 65504.0
FLOAT32_MAX = 3.4028234663852886e38


class Checks:
    """Conditions for a refusal that nobody has looked at yet: on a device, a look waits for what comes before."""

    def __init__(self) -> None:
        self._broken: list[Tensor] = []

    def add(self, broken: Tensor) -> None:
        """Notes a condition ``[]`` bool."""
        self._broken.append(broken)

    def any(self) -> Tensor:
        """Whether any of them holds, ``[]`` bool where they are."""
        return torch.stack(self._broken).any() if self._broken else torch.zeros((), dtype=torch.bool)


# Whoever encodes ahead looks later. Kernels have the same signatures for both, and on any other thread look at once.
_LATER: ContextVar[Checks | None] = ContextVar("fibkv_checks", default=None)


@contextmanager
def checked_later() -> Iterator[Checks]:
    """While the context lasts, nothing is refused on this thread: what would be is noted.

    Codes of what should have been refused are of no use, but finding them does no harm.
    """
    checks = Checks()
    token = _LATER.set(checks)
    try:
        yield checks
    finally:
        _LATER.reset(token)


def refuse_if(broken: Tensor, error: Callable[[], EncodingError]) -> None:
    """Refuses what is encoded if a condition ``[]`` bool holds.

    Raises:
        EncodingError: the one that is given, unless conditions are looked at later.
    """
    checks = _LATER.get()
    if checks is not None:
        checks.add(broken)
    elif bool(broken):
        raise error()


def require_finite(rows: Tensor) -> None:
    """Refuses rows with an element that is NaN or infinite.

    Raises:
        EncodingError: with the number of such elements.
    """
    finite = torch.isfinite(rows)

    def error() -> EncodingError:
        count = int((~finite).sum())
        return EncodingError(f"vectors must be finite, got {count} NaN or infinite of {rows.numel()} elements")

    refuse_if(finite.all().logical_not(), error)


def require_norms(norms: Tensor, norm_format: str) -> None:
    """Refuses norms ``[...]`` float64, at least one, that their stored form cannot hold.

    Raises:
        EncodingError: with the bound and the largest norm.
    """
    top = norms.max()
    if norm_format == "f16":
        message, limit = f"norms must be at most {FLOAT16_MAX:g} to be stored as float16", FLOAT16_MAX
    else:
        message, limit = "norms must be finite in float32", FLOAT32_MAX
    refuse_if(top > limit, lambda: EncodingError(f"{message}, got {float(top):.6g}"))


def mismatch(codes: Codes, tables: Tables) -> KernelError:
    """The error of codes that meet the tables of another codec."""
    return KernelError(f"{type(codes).__name__} cannot be read with {type(tables).__name__}")
