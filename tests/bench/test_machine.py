from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fibkv import kernels
from fibkv.kernels.native_sides import extension
from fibkv.machine import Conditions, available_memory, last_level_cache
from fibkv.threads import torch_threads


def _cache(folder: Path, index: int, level: int, size: str) -> None:
    (folder / f"index{index}").mkdir()
    (folder / f"index{index}" / "level").write_text(f"{level}\n")
    (folder / f"index{index}" / "size").write_text(f"{size}\n")


def test_the_last_level_cache_is_that_of_the_highest_level(tmp_path: Path) -> None:
    assert last_level_cache(tmp_path) is None
    for index, (level, size) in enumerate([(1, "48K"), (3, "512K"), (2, "2048K")]):
        _cache(tmp_path, index, level, size)
    assert last_level_cache(tmp_path) == 512 * 1024


def test_free_memory_is_what_a_container_leaves(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  100 kB\nMemAvailable:   50 kB\n")
    assert available_memory(meminfo, tmp_path) == 50 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert available_memory(meminfo, tmp_path) == 50 * 1024
    (tmp_path / "memory.max").write_text("5000\n")
    assert available_memory(meminfo, tmp_path) == 4000
    assert available_memory(tmp_path / "absent", tmp_path / "absent") > 0


def test_conditions_say_what_was_run_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/fibkv", "bench", "kernels", "--json", "a b.json"])
    conditions = Conditions.now(3)
    assert conditions.threads == 3
    assert conditions.cores >= 1
    assert conditions.command == "fibkv bench kernels --json 'a b.json'"
    assert dict(conditions.kernels) == kernels.available()
    assert dict(conditions.packages)["torch"] == torch.__version__
    assert Conditions.from_json(conditions.to_json()) == conditions


def test_threads_are_set_while_the_context_lasts() -> None:
    def fail_with(num_threads: int) -> None:
        with torch_threads(num_threads):
            raise RuntimeError(str(torch.get_num_threads()))

    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match=f"^{before + 1}$"):
        fail_with(before + 1)
    assert torch.get_num_threads() == before


def test_conditions_say_where_kernels_have_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    if extension is None:
        pytest.skip("native kernels were not built")
    for threads, said in ((True, "yes"), (False, "yes, on one thread")):
        monkeypatch.setattr(extension, "HAS_THREADS", threads)
        states = dict(Conditions.now(2).kernels)
        assert states["native"] == said
        assert states["reference"] == "yes"
