"""Tests that need a CUDA device; without one they are skipped. On an H100 the folder takes less than a minute."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

NoWaits = Callable[[], AbstractContextManager[None]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "tests/gpu" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def detect_waits(mode: str) -> None:
    """Sets what torch does when it waits for the device: "error", "warn" or "default"."""
    with warnings.catch_warnings():
        # It says that it is a prototype.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)


@pytest.fixture
def no_waits() -> NoWaits:
    """A context in which every operation of torch that waits for the device raises."""

    @contextmanager
    def forbidden() -> Iterator[None]:
        detect_waits("error")
        try:
            yield
        finally:
            detect_waits("default")

    return forbidden


@pytest.fixture(autouse=True)
def device_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton was told to interpret when the tests began; where there is a device that must not be so."""
    assert not torch.cuda.is_available() or not _interpreted(), "run tests/gpu alone, with TRITON_INTERPRET=0"


def _interpreted() -> bool:
    from fibkv.kernels import triton_load  # noqa: PLC0415 - imports triton

    return triton_load.INTERPRETED
