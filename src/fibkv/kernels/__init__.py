"""Kernels: encode, decode and attend on codes. One small interface, chosen here after all validation.

An implementation is a module with the functions of `fibkv.kernels.reference`. An explicit choice never falls back;
``auto`` takes the first available one in a fixed order by device. `available` says yes, or why not.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from fibkv.codes import Codes
from fibkv.errors import KernelError
from fibkv.kernels import reference
from fibkv.tables import Tables

__all__ = ["attend", "available", "decode", "encode", "merge", "resolve", "rotate", "unrotate"]

# Fastest first. The reference runs everywhere, so `auto` always finds one.
IMPLEMENTATIONS: dict[str, ModuleType] = {"reference": reference}


def available() -> dict[str, str]:
    """Implementation names in the order in which ``auto`` tries them, each with "yes" or the reason why not."""
    return dict.fromkeys(IMPLEMENTATIONS, "yes")


def resolve(name: str = "auto") -> ModuleType:
    """The implementation of that name.

    Raises:
        KernelError: there is no such implementation.
    """
    if name == "auto":
        return next(iter(IMPLEMENTATIONS.values()))
    try:
        return IMPLEMENTATIONS[name]
    except KeyError:
        known = ", ".join(["auto", *IMPLEMENTATIONS])
        raise KernelError(f"kernel implementation: expected one of {known}, got {name!r}") from None


def encode(rows: Tensor, tables: Tables, *, implementation: str = "auto") -> Codes:
    """Validates and encodes ``rows [..., T, d]``; see `reference.encode`.

    Raises:
        KernelError: rows are not floating point, have another head_dim, or hold no vector.
        EncodingError: the codec cannot represent a vector.
    """
    if not rows.is_floating_point():
        raise KernelError(f"rows: expected a floating dtype, got {rows.dtype}")
    if rows.ndim < 2 or rows.shape[-1] != tables.head_dim:
        raise KernelError(f"rows: expected shape [..., T, {tables.head_dim}], got {list(rows.shape)}")
    if rows.numel() == 0:
        raise KernelError(f"rows: expected at least one vector, got shape {list(rows.shape)}")
    codes: Codes = resolve(implementation).encode(rows.detach(), tables)
    return codes


def decode(codes: Codes, tables: Tables, *, out: Tensor | None = None, implementation: str = "auto") -> Tensor:
    """Decodes to ``[..., T, d]`` in the original space; see `reference.decode`."""
    vectors: Tensor = resolve(implementation).decode(codes, tables, out=out)
    return vectors


def rotate(query: Tensor, tables: Tables, *, implementation: str = "auto") -> Tensor:
    """Takes queries ``[..., Q, d]`` to the codes' space; see `reference.rotate`."""
    rotated: Tensor = resolve(implementation).rotate(query, tables)
    return rotated


def unrotate(out: Tensor, tables: Tables, *, implementation: str = "auto") -> Tensor:
    """Takes outputs ``[..., Q, d]`` back to the original space; see `reference.unrotate`."""
    original: Tensor = resolve(implementation).unrotate(out, tables)
    return original


def attend(
    query: Tensor,
    key_codes: Codes,
    key_tables: Tables,
    value_codes: Codes,
    value_tables: Tables,
    *,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Validates and attends on one part; see `reference.attend`.

    Raises:
        KernelError: the query's head_dim is not the keys', or the softcap is not positive.
    """
    if query.shape[-1] != key_tables.head_dim:
        raise KernelError(f"query: expected head_dim {key_tables.head_dim} of the keys, got shape {list(query.shape)}")
    if softcap is not None and not softcap > 0:
        raise KernelError(f"softcap: expected a positive number or None, got {softcap!r}")
    out, lse = resolve(implementation).attend(
        query, key_codes, key_tables, value_codes, value_tables, scale=scale, mask=mask, softcap=softcap
    )
    return out, lse


def merge(outs: Tensor, lses: Tensor, *, implementation: str = "auto") -> tuple[Tensor, Tensor]:
    """Merges parts by log-sum-exp; see `reference.merge`."""
    out, lse = resolve(implementation).merge(outs, lses)
    return out, lse
