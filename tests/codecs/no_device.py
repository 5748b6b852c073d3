"""Stands in for a device: kernels are compiled for an H100 and their launches are noted, tensors stay on the CPU.

For processes of their own, in which TRITON_INTERPRET is not set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fibkv.kernels import cuda_attend, tokens, triton, triton_step

MULTIPROCESSORS, SHARED = 132, 227 << 10
# Told of a launch: what is launched (the digest of a compiled Triton kernel), and all that it is given.
Note = Callable[[str, tuple[Any, ...]], None]


class Utils:
    """What Triton asks a driver about kernels and devices."""

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[object, int, int, int, int]:
        # A module, its function, registers, spilled bytes, and how many threads may run it.
        return object(), 1, 64, 0, 1024

    def unload_module(self, module: object) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED}


class Driver:
    """What Triton asks of a driver: the answers of one H100."""

    def __init__(self, note: Note) -> None:
        self.utils = Utils()
        self.launcher_cls = lambda source, metadata: lambda *given: note(metadata.hash, given)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def stand_in(note: Note, *, cuda: bool) -> None:
    """For the rest of the process, "triton" attends to tensors on the CPU by launches that are noted, and not done.

    Args:
        note: told of each.
        cuda: whether pages are read in CUDA C++ where that can be; the programs are not compiled.
    """
    driver.set_active(Driver(note))
    triton.why_not = lambda device_type: "yes"
    triton_step._multiprocessors = lambda device: MULTIPROCESSORS
    # Tokens go to a tail as they do where there is no address to write to.
    tokens.extension = None
    if cuda:
        _stand_in_for_cuda_core(note)


def _stand_in_for_cuda_core(note: Note) -> None:
    import cuda.core  # noqa: PLC0415 - optional

    def program(found: cuda_attend.Reading, device: int) -> cuda_attend.Program:
        return cuda_attend.Program(None, found.warps * cuda_attend.LANES, found.shared)

    cuda_attend.why_not = lambda: "yes"
    cuda_attend._most_shared = lambda device: SHARED - cuda_attend.BESIDES
    cuda_attend._program = program
    cuda_attend._stream = lambda handle: None
    cuda.core.launch = lambda stream, config, kernel, *given: note("cuda", (config, *given))
