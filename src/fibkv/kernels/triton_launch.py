"""Launches of Triton kernels: Triton is asked for a kernel once, and not at every step.

A launch by way of Triton's own call looks at each argument to find out which compiled kernel it is for: tens of
microseconds. What is compiled here depends on a kernel's constants and on which tensors begin at an address that 16
bytes divide, and on nothing else: their dtypes follow from the constants, and no kernel is specialized to a number.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fibkv.errors import KernelError

# Bytes that Triton asks about whether they divide an address.
ALIGNMENT = 16


class Kernel:
    """A Triton kernel of given constants on one device; see `kernel_of`."""

    def __init__(self, function: Any, constants: Mapping[str, Any], options: Mapping[str, int]) -> None:
        self._function, self._constants, self._options = function, constants, options
        self._last = tuple(constants.values())
        self._compiled: dict[tuple[bool, ...], Any] = {}

    def launch(
        self, grid: tuple[int, int, int], stream: int, tensors: Sequence[Tensor], numbers: Sequence[float]
    ) -> None:
        """Launches on a stream of the device, which is torch's current one.

        Args:
            grid: programs on three axes.
            stream: its handle.
            tensors: the kernel's first arguments, of the dtypes that its constants imply.
            numbers: those that follow: floats where it takes floats, integers of 32 bits, or of 64 where it says so.

        Raises:
            KernelError: the device has no room for such programs.
        """
        addresses = [tensor.data_ptr() for tensor in tensors]
        kind = tuple([address % ALIGNMENT == 0 for address in addresses])
        compiled = self._compiled.get(kind)
        if compiled is not None:
            compiled[grid](*addresses, *numbers, *self._last, stream=stream)
            return
        try:
            # What was launched; the interpreter compiles nothing, and returns nothing.
            self._compiled[kind] = self._function[grid](*tensors, *numbers, **self._constants, **self._options)
        except OutOfResources as error:
            raise KernelError(f"triton kernels: {error}, with {dict(self._options)}") from error


@lru_cache(maxsize=1 << 10)
def _kernel(function: Any, device: torch.device, constants: Hashable, options: Hashable) -> Kernel:  # noqa: ARG001
    return Kernel(function, dict(constants), dict(options))  # type: ignore[call-overload]


def kernel_of(function: Any, device: torch.device, constants: Mapping[str, Any], **options: int) -> Kernel:
    """The kernel of a ``triton.jit`` function on a device, one for each set of constants.

    Args:
        function: takes tensors, then numbers, then constants; of numbers that it is not specialized to.
        device: where it is launched.
        constants: hashable, in the order in which the function takes them.
        **options: of Triton, beside fused multiply-add.
    """
    return _kernel(function, device, tuple(constants.items()), (("enable_fp_fusion", True), *options.items()))


def stream_of(device: torch.device) -> int:
    """The handle of torch's current stream on a device, which a graph may be capturing; 0 on the CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
