"""Kernels: encode, decode and attend on codes. One small interface, chosen here after all validation.

An implementation offers the functions of `fibkv.kernels.reference`. An explicit choice never falls back; ``auto`` takes
the first available one for the tensors' device in a fixed order. `available` says yes, or why not.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from fibkv.codes import Codes
from fibkv.errors import KernelError
from fibkv.kernels import native, reference, triton
from fibkv.kernels.native import Native
from fibkv.kernels.runs import InPlace
from fibkv.kernels.triton import Triton
from fibkv.tables import Tables

__all__ = ["attend", "available", "decode", "encode", "in_place", "merge", "resolve", "rotate", "unrotate"]

CPU = torch.device("cpu")
# Names in the order in which `auto` tries them, with the instruction set that a name forces. The reference runs on
# every device, so `auto` always finds one.
INSTRUCTION_SETS: dict[str, str | None] = {
    "native": None,
    **{f"native-{name}": name for name in native.INSTRUCTION_SETS},
}
TRITON = "triton"
REFERENCE = "reference"


def available() -> dict[str, str]:
    """Implementation names in the order in which ``auto`` tries them, each with "yes" or the reason why not.

    ``triton`` is answered for the devices that there are: CUDA if any, else the CPU.
    """
    return {
        **{name: native.why_not(isa) for name, isa in INSTRUCTION_SETS.items()},
        TRITON: triton.why_not("cuda" if torch.cuda.is_available() else "cpu"),
        REFERENCE: "yes",
    }


def resolve(name: str = "auto", device: torch.device = CPU) -> ModuleType | Native | Triton:
    """The implementation of that name.

    Args:
        name: "auto", or one of `available`. ``auto`` is native on the CPU, and triton on CUDA devices.
        device: where the tensors are.

    Raises:
        KernelError: there is no such implementation, it is not available, or it does not run on that device.
    """
    if name == "auto":
        name = _automatic(device.type)
    if name == REFERENCE:
        return reference
    if name == TRITON:
        return _triton(device.type)
    if name not in INSTRUCTION_SETS:
        known = ", ".join(["auto", *available()])
        raise KernelError(f"kernel implementation: expected one of {known}, got {name!r}")
    if device.type != "cpu":
        raise KernelError(f"kernel implementation {name!r}: expected tensors on the CPU, got {device}")
    return _native(INSTRUCTION_SETS[name])


@cache
def in_place(name: str, device: torch.device) -> InPlace | None:
    """The implementation of that name, if it reads pages where they lie; looked for once, as each step asks.

    Raises:
        KernelError: see `resolve`.
    """
    chosen = resolve(name, device)
    return chosen if isinstance(chosen, InPlace) else None


def _automatic(device_type: str) -> str:
    if device_type == "cpu" and native.why_not() == "yes":
        return "native"
    if device_type == "cuda" and triton.why_not(device_type) == "yes":
        return TRITON
    return REFERENCE


@cache
def _native(instruction_set: str | None) -> Native:
    return Native(instruction_set)


@cache
def _triton(device_type: str) -> Triton:
    return Triton(device_type)


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
    codes: Codes = resolve(implementation, rows.device).encode(rows.detach(), tables)
    return codes


def decode(codes: Codes, tables: Tables, *, out: Tensor | None = None, implementation: str = "auto") -> Tensor:
    """Decodes to ``[..., T, d]`` in the original space; see `reference.decode`."""
    vectors: Tensor = resolve(implementation, codes.device).decode(codes, tables, out=out)
    return vectors


def rotate(query: Tensor, tables: Tables) -> Tensor:
    """Takes queries ``[..., Q, d]`` to the codes' space; see `reference.rotate`."""
    return reference.rotate(query, tables)


def unrotate(out: Tensor, tables: Tables) -> Tensor:
    """Takes outputs ``[..., Q, d]`` back to the original space; see `reference.unrotate`."""
    return reference.unrotate(out, tables)


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
    key_mean: Tensor | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Validates and attends on one part; see `reference.attend`.

    Raises:
        KernelError: the query's or the mean's head_dim is not the keys', or the softcap is not positive.
    """
    for name, tensor in (("query", query), ("key_mean", query if key_mean is None else key_mean)):
        if tensor.shape[-1] != key_tables.head_dim:
            raise KernelError(
                f"{name}: expected head_dim {key_tables.head_dim} of the keys, got shape {list(tensor.shape)}"
            )
    if softcap is not None and not softcap > 0:
        raise KernelError(f"softcap: expected a positive number or None, got {softcap!r}")
    out, lse = resolve(implementation, query.device).attend(
        query,
        key_codes,
        key_tables,
        value_codes,
        value_tables,
        scale=scale,
        mask=mask,
        softcap=softcap,
        key_mean=key_mean,
    )
    return out, lse


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merges parts by log-sum-exp; see `reference.merge`."""
    return reference.merge(outs, lses)
