"""The Triton kernels: for tensors on an NVIDIA GPU, and in Triton's interpreter for tensors on the CPU.

Triton is imported when a `Triton` is made, not before: whoever has no GPU needs none. The interpreter is for tests;
it is chosen by ``TRITON_INTERPRET=1`` in the environment of the process, Triton's own switch.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from fibkv.codes import Codes, RawCodes
from fibkv.errors import KernelError
from fibkv.kernels import reference
from fibkv.tables import RawTables, Tables


def why_not(device_type: str) -> str:
    """ "yes" if the kernels run on tensors on devices of this type (``cuda``, ``cpu``), else the reason."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cuda":
        return "yes" if torch.cuda.is_available() else "no CUDA device"
    if device_type != "cpu":
        return f"expected tensors on a CUDA device, got {device_type}"
    return "yes" if _interpreted() else "tensors on the CPU need TRITON_INTERPRET=1, which is for tests"


def _interpreted() -> bool:
    from fibkv.kernels import triton_load  # noqa: PLC0415 - imports triton

    return triton_load.INTERPRETED


class Triton:
    """Triton kernels on devices of one type."""

    def __init__(self, device_type: str) -> None:
        """Raises KernelError where `why_not` does not say "yes"."""
        reason = why_not(device_type)
        if reason != "yes":
            raise KernelError(f"triton kernels: {reason}")
        from fibkv.kernels import triton_codes  # noqa: PLC0415 - imports triton

        self._codes = triton_codes

    def encode(self, rows: Tensor, tables: Tables) -> Codes:
        """Encodes ``rows [..., T, d]``; see `fibkv.kernels.reference.encode`."""
        return self._codes.encode(rows, tables)

    def decode(self, codes: Codes, tables: Tables, *, out: Tensor | None = None) -> Tensor:
        """Decodes to ``[..., T, d]``; see `fibkv.kernels.reference.decode`."""
        return self._codes.decode(codes, tables, out=out)

    def attend(
        self,
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
    ) -> tuple[Tensor, Tensor]:
        """Attention of rotated queries on one part of a cache; see `fibkv.kernels.reference.attend`.

        The part is decoded by the kernels, and attended to by torch.
        """
        keys = reference.rotate(self.decode(key_codes, key_tables), key_tables)
        values = reference.rotate(self.decode(value_codes, value_tables), value_tables)
        return reference.attend(
            query,
            RawCodes(keys),
            RawTables(torch.float32, key_tables.head_dim),
            RawCodes(values),
            RawTables(torch.float32, value_tables.head_dim),
            scale=scale,
            mask=mask,
            softcap=softcap,
            key_mean=key_mean,
        )
