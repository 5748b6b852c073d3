"""Files that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file by way of a temporary one beside it, so that readers see all of it or nothing.

    Its directory is made if absent. Any number of processes may write the same file: one of them wins.

    Raises:
        OSError: the directory cannot be made or written to; nothing is left behind then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for text in UTF-8, with a newline at its end."""
    write_bytes(path, f"{text}\n".encode())
