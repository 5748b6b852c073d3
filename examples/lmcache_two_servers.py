"""LMCache servers that share chunks in codes of fibkv, in a directory or in Redis. No GPU and no model are needed.

    python examples/lmcache_two_servers.py /tmp/kv
    python examples/lmcache_two_servers.py redis://127.0.0.1:6379

A first server is handed keys and values by LMCache's own benchmark client, and ends. A second one, a new process with
nothing in memory, finds them where the first has put them. To a third one with other codecs they are misses.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import urlopen

# Layers, KV heads and head_dim of the client's model, its requests, and the server's chunks of tokens.
LAYERS, HEADS, HEAD_DIM = 4, 8, 128
REQUESTS, CHUNKS_PER_REQUEST, CHUNK_TOKENS = 2, 2, 256
CHUNKS = REQUESTS * CHUNKS_PER_REQUEST
BFLOAT16_NBYTES = CHUNKS * 2 * LAYERS * CHUNK_TOKENS * HEADS * HEAD_DIM * 2
PATIENCE_SECONDS = 60
LMCACHE = [sys.executable, "-m", "fibkv.lmcache"]


def adapter(place: str, codec: str) -> dict[str, Any]:
    """LMCache's configuration of a tier: where, and with which codec for keys and values."""
    serde = {"type": "fibkv", "head_dim": HEAD_DIM, "keys": codec, "values": codec}
    if not place.startswith("redis://"):
        Path(place).mkdir(parents=True, exist_ok=True)
        return {"type": "fs", "base_path": place, "serde": serde}
    url = urlparse(place)
    return {"type": "resp", "host": url.hostname, "port": url.port or 6379, "serde": serde}


def stored_sizes(place: str) -> list[int]:
    """Bytes of every object that lies there."""
    if not place.startswith("redis://"):
        return [path.stat().st_size for path in Path(place).glob("**/*.data")]
    from redis import Redis  # noqa: PLC0415 - directories do not need it

    with Redis.from_url(place) as client:
        return [int(client.strlen(key)) for key in client.scan_iter()]


@contextmanager
def server(place: str, codec: str) -> Iterator[tuple[int, int]]:
    """A server while the context lasts; its port for clients and that for HTTP."""
    ports = free_port(), free_port()
    options = ["--l1-size-gb", "0.25", "--no-l1-use-lazy", "--eviction-policy", "LRU"]
    options += ["--chunk-size", str(CHUNK_TOKENS), "--l2-adapter", json.dumps(adapter(place, codec))]
    # The client has its tensors in its own memory and sends them; with vLLM on a GPU, leave this out.
    options += ["--supported-transfer-mode", "engine_driven"]
    command = [*LMCACHE, "server", *options, "--port", str(ports[0]), "--http-port", str(ports[1])]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: answers(ports[1]) or process.poll() is not None)
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode}: {' '.join(command)}")
        yield ports
    finally:
        process.terminate()
        process.wait()


def chunks_found(ports: tuple[int, int]) -> int:
    """Sends the requests; returns how many of their chunks the server had already. Others it has then."""
    shape = f"(2,64,16,{HEADS},{HEAD_DIM}):bfloat16:{LAYERS}"
    options = ["--mode", "cpu", "--kvcache-shape-spec", shape, "--num-blocks", "64", "--interval", "0.1"]
    options += ["--num-tokens", str(CHUNKS_PER_REQUEST * CHUNK_TOKENS), "--end", str(REQUESTS)]
    options += ["--rpc-url", f"tcp://127.0.0.1:{ports[0]}", "--url", f"http://127.0.0.1:{ports[1]}"]
    done = subprocess.run([*LMCACHE, "bench", "server", *options], capture_output=True, text=True, check=True)
    found = re.findall(r"/cold\] LOOKUP: (\d+)/(\d+) chunks hit", done.stdout)
    if [total for _, total in found] != [str(CHUNKS_PER_REQUEST)] * REQUESTS:
        raise SystemExit(f"LMCache's client did not do what was expected:\n{done.stdout}\n{done.stderr}")
    return sum(int(hits) for hits, _ in found)


def answers(port: int) -> bool:
    """Whether there is something at an HTTP port."""
    try:
        with urlopen(f"http://127.0.0.1:{port}/", timeout=1):
            return True
    except OSError as error:
        return hasattr(error, "code")


def free_port() -> int:
    """A port that nothing listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Any) -> None:
    """Comes back when it is true."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited for {PATIENCE_SECONDS} s in vain")
        time.sleep(0.1)


def main(place: str) -> None:
    """Three servers, one after another."""
    with server(place, "fib4") as ports:
        print(f"first server:        {chunks_found(ports)} of {CHUNKS} chunks found, the rest stored")
        # LMCache stores in the background.
        wait_for(lambda: len(stored_sizes(place)) == CHUNKS)
    nbytes = sum(stored_sizes(place))
    print(f"stored:              {nbytes} bytes, {nbytes / BFLOAT16_NBYTES:.3f} of bfloat16")
    for name, codec in (("second server:", "fib4"), ("with other codecs:", "scalar4")):
        with server(place, codec) as ports:
            print(f"{name:20} {chunks_found(ports)} of {CHUNKS} chunks found")


if __name__ == "__main__":
    main(*sys.argv[1:])
