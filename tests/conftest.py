"""For all tests: Triton kernels run in Triton's interpreter, on the CPU. Read when triton is imported, so set here."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(params=["at once", "beside"])
def sealed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How pages are sealed: as on the CPU, or as on a device, on a stream that is late."""
    from tests.pages.streams import LateStream, late_memory  # noqa: PLC0415 - imports torch

    if request.param == "beside":
        monkeypatch.setattr("fibkv.cache.PageMemory", late_memory)
        monkeypatch.setattr("fibkv.page_memory.side_stream", lambda device: LateStream())
    return request.param
