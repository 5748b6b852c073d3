"""LMCache with its file adapter and with a real redis-server: run by .ci/run in an environment that has it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from redis import Redis

pytest.importorskip("lmcache.v1.distributed", reason="LMCache has an environment of its own, see .ci/run")

from lmcache.v1.distributed.serde.base import SerdeConfig
from lmcache.v1.distributed.serde.factory import create_serde_processor

from fibkv.chunks import ChunkCodec
from fibkv.errors import ContractError
from fibkv.lmcache import register
from tests.lmcache.worker import CHUNKS, SHAPE
from tests.store.servers import redis_server, unused_port

ROOT = Path(__file__).parents[2]
NBYTES = ChunkCodec(128).encoded_nbytes(SHAPE, CHUNKS.dtype)
BFLOAT16_NBYTES = SHAPE.numel() * 2


@dataclass(frozen=True)
class Tier:
    """Where chunks lie: LMCache's adapter for it, the example's name of it, and what lies there."""

    adapter: dict[str, object]
    place: str
    names: Callable[[], list[str]]
    read: Callable[[str], bytes]
    write: Callable[[str, bytes], object]

    def configured(self, **serde: object) -> str:
        return json.dumps({**self.adapter, "serde": {"type": "fibkv", "head_dim": 128, **serde}})


@pytest.fixture(params=["fs", "resp"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tier]:
    if request.param == "fs":
        adapter: dict[str, object] = {"type": "fs", "base_path": str(tmp_path)}
        names = lambda: sorted(str(path) for path in tmp_path.glob("**/*.data"))  # noqa: E731
        read, write = lambda name: Path(name).read_bytes(), lambda name, data: Path(name).write_bytes(data)
        yield Tier(adapter, str(tmp_path), names, read, write)
        return
    port = unused_port()
    with redis_server(tmp_path, "--port", str(port)), Redis(port=port) as client:
        names = lambda: sorted(key.decode() for key in client.scan_iter())  # noqa: E731
        yield Tier(
            {"type": "resp", "host": "127.0.0.1", "port": port},
            f"redis://127.0.0.1:{port}",
            names,
            client.get,
            client.set,
        )


def started(*command: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": paths, "LMCACHE_DISABLE_BANNER": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *command], env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )


def ended(process: subprocess.Popen[str]) -> str:
    """What a process has said; it must end well, whatever LMCache makes of what it finds."""
    said, complaints = process.communicate()
    assert process.returncode == 0, complaints
    return said


def fetched(*adapters: str) -> list[list[float]]:
    """What another process finds with each adapter: the errors of its hits."""
    return json.loads(ended(started("-m", "tests.lmcache.worker", "load", *adapters)).splitlines()[-1])


def test_what_one_process_stores_another_one_hits(tier: Tier) -> None:
    first = started("-m", "tests.lmcache.worker", "store", tier.configured())
    while first.poll() is None and [len(tier.read(name)) for name in tier.names()] != [NBYTES] * len(CHUNKS):
        time.sleep(0.1)
    ended(first)
    assert len(tier.names()) == len(CHUNKS)
    print(f"{NBYTES} bytes a chunk, {NBYTES / BFLOAT16_NBYTES:.3f} of bfloat16")
    assert NBYTES <= 0.29 * BFLOAT16_NBYTES

    # Codes of scalar4 have the size of those of fib4: nothing but what the chunk says tells them apart.
    same, codec, profile = tier.configured(), {"keys": "int8", "values": "int8"}, {"keys": "scalar4"}
    assert ChunkCodec(128, **profile).encoded_nbytes(SHAPE, CHUNKS.dtype) == NBYTES
    hits, *misses = fetched(same, tier.configured(**codec), tier.configured(**profile), tier.configured(head_dim=64))
    assert len(hits) == len(CHUNKS)
    assert all(0.004 < error < 0.012 for error in hits)
    assert misses == [[], [], []]

    for name, damaged in zip(tier.names(), (flipped, zeroed, swapped), strict=True):
        tier.write(name, damaged(tier.read(name)))
    assert fetched(same) == [[]]


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def zeroed(data: bytes) -> bytes:
    return bytes(len(data))


def swapped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[middle:] + data[:middle]


@pytest.mark.parametrize("tier", ["resp"], indirect=True)
def test_the_example_of_two_servers(tier: Tier) -> None:
    said = ended(started("examples/lmcache_two_servers.py", tier.place))
    print(said)
    found = re.findall(r"(\d+) of 4 chunks found", said)
    assert found == ["0", "4", "0"]
    assert float(re.findall(r"([\d.]+) of bfloat16", said)[0]) <= 0.29


def test_options_are_checked() -> None:
    register()
    for options in ({}, {"head_dim": 128, "bits": 4}):
        with pytest.raises(ContractError, match="lmcache serde fibkv"):
            create_serde_processor(SerdeConfig("fibkv", options))
    with pytest.raises(ContractError, match="parameters name"):
        create_serde_processor(SerdeConfig("fibkv", {"head_dim": 128, "keys": "fib9"}))
    create_serde_processor(SerdeConfig("fibkv", {"head_dim": 64, "keys": "fib4", "values": "fib2"})).close()
