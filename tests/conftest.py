"""For all tests: Triton kernels run in Triton's interpreter, on the CPU. Read when triton is imported, so set here."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(params=["at once", "beside", "offloaded"])
def sealed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How pages are sealed: as on the CPU, or as on a device, on a stream that is late, to stay or to go."""
    from fibkv.page_memory import PageMemories  # noqa: PLC0415 - imports torch
    from tests.pages import streams  # noqa: PLC0415

    if request.param != "at once":
        memory = streams.late_memory if request.param == "beside" else streams.offloaded_memory
        monkeypatch.setattr("fibkv.cache.PageMemory", memory)
        monkeypatch.setattr("fibkv.page_memory.side_stream", lambda device: streams.LateStream())
    if request.param == "offloaded":
        monkeypatch.setattr("fibkv.hf.PageMemories", lambda inventory, **_: PageMemories(inventory, offloading=True))
    return request.param
