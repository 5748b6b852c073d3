from __future__ import annotations

import pytest

from fibkv.bench_kernels import run_kernels
from fibkv.bench_prefill import run_prefill
from fibkv.bench_result import KernelResult, PrefillResult, StepResult
from fibkv.bench_settings import QUICK_KERNELS, QUICK_PREFILL, QUICK_STEPS
from fibkv.bench_steps import run_steps
from tests.quality.conftest import _one_thread  # noqa: F401 - tensors as small as those there


def quiet(label: str, done: int, total: int) -> None:
    """The progress that nobody watches."""


@pytest.fixture(scope="session")
def kernel_result() -> KernelResult:
    return run_kernels(QUICK_KERNELS, quiet)


@pytest.fixture(scope="session")
def step_result() -> StepResult:
    return run_steps(QUICK_STEPS, quiet)


@pytest.fixture(scope="session")
def prefill_result() -> PrefillResult:
    return run_prefill(QUICK_PREFILL, quiet)
