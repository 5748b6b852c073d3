"""What a parser may do with bytes from outside: read them, or refuse them in fibkv's words, in bounded memory."""

from __future__ import annotations

import tracemalloc
from hashlib import sha256
from pathlib import Path

from fibkv.errors import FibkvError
from tests.fuzz.forms import Sections
from tests.fuzz.targets import target

ALLOWED_NBYTES = 1 << 20
# What JSON without a container around it may cost for a byte of text: it is of files that the user has chosen.
JSON_COST = 100


def check(name: str, data: bytes, failures: Path | None = None) -> bool:
    """Whether a target reads the bytes; whatever it must not do is raised, and the bytes are kept in ``failures``."""
    read_bytes = target(name).read
    if not tracemalloc.is_tracing():
        tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    try:
        read = True
        try:
            read_bytes(data)
        except FibkvError:
            read = False
        used = tracemalloc.get_traced_memory()[1] - before
        cost = 1 if isinstance(target(name).form, Sections) else JSON_COST
        assert used < cost * len(data) + ALLOWED_NBYTES, f"{name}: {used} bytes taken for {len(data)}"
    except BaseException:
        if failures is not None:
            failures.mkdir(parents=True, exist_ok=True)
            (failures / f"{name}-{sha256(data).hexdigest()[:12]}").write_bytes(data)
        raise
    return read
