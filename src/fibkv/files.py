"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from errno import EACCES, EISDIR, ENOTDIR
from pathlib import Path
from uuid import uuid4


def write_bytes(path: Path, data: bytes | memoryview, *, fsync: bool = False) -> None:
    """Writes a file by way of a temporary one beside it, so that readers see all of it or nothing.

    Its directory is made if absent. Any number of processes may write the same file: one of them wins.

    Args:
        path: of the file.
        data: all of its bytes.
        fsync: come back only when the file would survive a loss of power.

    Raises:
        OSError: the directory cannot be made or written to; nothing is left behind then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if fsync:
            _sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def writable(path: Path | None) -> Path | None:
    """The path of a file that is to be written later, if it can be: looked at before the work, not after it.

    Raises:
        OSError: it is a directory, or one that it needs cannot be made or written to.
    """
    if path is None:
        return None
    there = next(parent for parent in path.absolute().parents if parent.exists())
    refusal = (
        (path.is_dir() and EISDIR)
        or (not there.is_dir() and ENOTDIR)
        or (not os.access(there, os.W_OK | os.X_OK) and EACCES)
    )
    if refusal:
        raise OSError(refusal, os.strerror(refusal), str(path))
    return path


def _sync_directory(path: Path) -> None:
    """Makes the names in a directory survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for text in UTF-8, with a newline at its end."""
    write_bytes(path, f"{text}\n".encode())
