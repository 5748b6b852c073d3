"""Servers that tests start."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def redis_server(path: Path, *options: str) -> Iterator[Path]:
    """A redis-server that keeps nothing while the context lasts, and its socket in a directory."""
    program = shutil.which("redis-server")
    assert program is not None, "these tests start a redis-server: apt-get install redis-server"
    place = path / "socket"
    command = [program, "--unixsocket", str(place), "--save", "", "--dir", str(path), *options]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while not place.exists():
            assert server.poll() is None
            time.sleep(0.01)
        yield place
    finally:
        server.terminate()
        server.wait()


def unused_port() -> int:
    """A port that nothing listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
