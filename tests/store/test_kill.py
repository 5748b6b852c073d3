"""A short run of `tests/store/kill.py`, and directories that do not take what is written."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from pathlib import Path

from fibkv.prefix_save import save_prefix
from fibkv.store import DirectoryStore
from tests.store.kill import IDS, temporary
from tests.store.prefixes import binding, fed


def test_kills_lose_nothing_that_was_committed() -> None:
    run = [sys.executable, "-m", "tests.store.kill", "--kills", "5", "--seed", "1"]
    done = subprocess.run(run, check=True, capture_output=True, text=True, timeout=300)
    assert "none lost" in done.stdout
    committed = re.search(r"(\d+) objects committed", done.stdout)
    assert committed is not None
    assert int(committed[1]) > 0


def test_a_full_disk_makes_a_shorter_prefix(tmp_path: Path) -> None:
    layers, store = fed(IDS), DirectoryStore(tmp_path)
    save_prefix(store, binding(), layers, IDS)
    largest = max(entry.nbytes for entry in store.list())
    for entry in list(store.list()):
        if entry.nbytes == largest:
            store.delete(entry.key)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A write that ends in the middle of a file, as on a disk that fills up.
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, before[1]))
    try:
        result = save_prefix(store, binding(), layers, IDS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in str(result.failure)
    assert not list(temporary(tmp_path))
    again = save_prefix(store, binding(), layers, IDS)
    assert (again.failure, again.written) == (None, 1)


READ_ONLY = """
import os, sys, tempfile
from pathlib import Path
from fibkv.prefix_save import save_prefix
from fibkv.store import DirectoryStore
from tests.store.kill import IDS
from tests.store.prefixes import binding, fed
from tests.store.test_prefixes import loaded

layers = fed(IDS)
with tempfile.TemporaryDirectory() as folder:
    save_prefix(DirectoryStore(folder), binding(), layers, IDS)
    for path in (Path(folder), *Path(folder).rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    if (child := os.fork()) == 0:
        if os.getuid() == 0:
            os.setuid(65534)  # nothing is read-only to root
        store = DirectoryStore(folder)
        found, _ = loaded(store, IDS)
        other = save_prefix(store, binding(weights="name:other"), layers, IDS)
        os._exit(0 if found[0].length == len(IDS) and "Permission denied" in str(other.failure) else 1)
    assert os.waitpid(child, 0)[1] == 0
    Path(folder).chmod(0o755)
    for path in Path(folder).rglob("*"):
        path.chmod(0o755)
"""


def test_a_directory_that_is_read_only_is_read() -> None:
    subprocess.run([sys.executable, "-c", READ_ONLY], check=True, timeout=300)
