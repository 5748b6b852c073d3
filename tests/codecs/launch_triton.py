"""Launches attention on a growing layer as on a device, of which only the driver's answers are needed: kernels are
compiled by the calls that would launch them, and not run. Prints the number of kernels after each step.

``python -m tests.codecs.launch_triton``; TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fibkv.attend import Scores, attend
from fibkv.kernels import triton, triton_step
from tests.codecs.conformance import gaussian
from tests.codecs.test_native import filled

STEPS = 20


class Driver:
    """What Triton asks of a driver before it launches: the answers of one H100."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def main() -> None:
    """A layer that seals a page within the steps, and queries as in decoding."""
    driver.set_active(Driver())
    kernels: set[str] = set()
    launch = JITFunction.run

    def compile_only(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        made = launch(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.add(made.hash)
        return made

    JITFunction.run = compile_only
    triton.why_not = lambda device_type: "yes"
    triton_step._multiprocessors = lambda device: 132
    cache = filled(("fib4", "fib4"), "reference", batch=1, tokens=90)
    sealed = len(cache.rows[0])
    for _ in range(STEPS):
        new = gaussian(1, 2, 1, 64)
        attend(gaussian(1, 4, 1, 64), cache.append(new, new), Scores(0.125), implementation="triton")
        print(cache.length, "tokens,", len(cache.rows[0]) - sealed, "pages more:", len(kernels), "kernels")


if __name__ == "__main__":
    main()
