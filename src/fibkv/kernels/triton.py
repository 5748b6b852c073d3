"""The Triton kernels: for tensors on an NVIDIA GPU, and in Triton's interpreter for tensors on the CPU.

Triton is imported when a `Triton` is made, not before: whoever has no GPU needs none. The interpreter is for tests;
it is chosen by ``TRITON_INTERPRET=1`` in the environment of the process, Triton's own switch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fibkv.codes import Codes
from fibkv.errors import KernelError
from fibkv.kernels.runs import InPlace, Run, Scores
from fibkv.kernels.triton_tuning import Tunings, load_tunings
from fibkv.tables import Tables

if TYPE_CHECKING:
    from fibkv.kernels.triton_step import Plan

# The first one that multiplies in float64.
OLDEST = (3, 5)


def why_not(device_type: str) -> str:
    """ "yes" if the kernels run on tensors on devices of this type (``cuda``, ``cpu``), else the reason."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if _release() < OLDEST:
        return f"triton {'.'.join(map(str, OLDEST))} or newer is needed, {version('triton')} is installed"
    if device_type == "cuda":
        return "yes" if torch.cuda.is_available() else "no CUDA device"
    if device_type != "cpu":
        return f"expected tensors on a CUDA device, got {device_type}"
    return "yes" if _interpreted() else "tensors on the CPU need TRITON_INTERPRET=1, which is for tests"


@cache
def _release() -> tuple[int, ...]:
    """Triton's major and minor version, without importing it; the oldest that serves where no package says."""
    try:
        return tuple(int(part) for part in version("triton").split(".")[:2])
    except PackageNotFoundError:
        return OLDEST


def _interpreted() -> bool:
    from fibkv.kernels import triton_load  # noqa: PLC0415 - imports triton

    return triton_load.INTERPRETED


@cache
def device_name(device: torch.device) -> str:
    """The name that tunings of a device are kept under."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a device the one that Triton launches on: the current one, wherever the tensors are."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _float32(device_type: str) -> AbstractContextManager[object]:
    """In which float32 means float32, also inside an autocast region; outside of one it costs nothing."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


class Triton(InPlace):
    """Triton kernels on devices of one type."""

    def __init__(self, device_type: str, tunings: Tunings | None = None) -> None:
        """By default launches are as they were found fastest on each device (`fibkv bench gpu --tune`).

        Raises:
            KernelError: where `why_not` does not say "yes".
        """
        reason = why_not(device_type)
        if reason != "yes":
            raise KernelError(f"triton kernels: {reason}")
        from fibkv.kernels import triton_codes, triton_plan, triton_step  # noqa: PLC0415 - these import triton

        self._tunings = tunings
        self._codes, self._plan, self._step = triton_codes, triton_plan, triton_step

    def tunings(self, device: torch.device) -> Tunings:
        """How attention is launched on a device."""
        return self._tunings or load_tunings(device_name(device))

    def encode(self, rows: Tensor, tables: Tables) -> Codes:
        """Encodes ``rows [..., T, d]``; see `fibkv.kernels.reference.encode`."""
        with _current(rows.device):
            return self._codes.encode(rows, tables)

    def decode(self, codes: Codes, tables: Tables, *, out: Tensor | None = None) -> Tensor:
        """Decodes to ``[..., T, d]``; see `fibkv.kernels.reference.decode`."""
        with _current(codes.device):
            return self._codes.decode(codes, tables, out=out)

    def plan(self, runs: Sequence[Run]) -> Plan:
        """Makes runs ready to be attended to; see `fibkv.kernels.runs.InPlace`.

        Raises:
            KernelError: pages on several devices.
        """
        return self._step.Plan([self._plan.Group.of_run(run) for run in runs], self.tunings)

    def attend_plan(
        self,
        query: Tensor,
        plan: Plan,
        tail: tuple[Tensor, Tensor, int],
        scores: Scores,
        *,
        length: int,
    ) -> tuple[Tensor, Tensor]:
        """Attention on everything that a layer holds; see `fibkv.kernels.runs.InPlace`.

        Raises:
            KernelError: queries and pages on several devices, or a tuning that the device has no room for.
        """
        with _current(query.device), _float32(query.device.type):
            return plan.attend(query.detach(), tail, scores, length - query.shape[2])
