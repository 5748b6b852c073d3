"""LMCache's own storage manager, with its file adapter and our serde: run by .ci/run in an environment that has it."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("lmcache.v1.distributed", reason="LMCache has an environment of its own, see .ci/run")

from lmcache.v1.distributed.api import GroupedObjectKeys, MemoryLayoutDesc, ObjectKey, PrefetchTaskSpec
from lmcache.v1.distributed.config import EvictionConfig, L1ManagerConfig, L1MemoryManagerConfig, StorageManagerConfig
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.distributed.serde.base import SerdeConfig
from lmcache.v1.distributed.serde.factory import create_serde_processor
from lmcache.v1.distributed.storage_manager import StorageManager

from fibkv.chunks import ChunkCodec
from fibkv.errors import ContractError
from fibkv.lmcache import register

SHAPE = torch.Size([2, 4, 64, 256])
LAYOUT = MemoryLayoutDesc([SHAPE], [torch.bfloat16])
KEYS = [ObjectKey(chunk_hash=bytes([number]) * 32, model_name="test", kv_rank=0) for number in range(3)]
CHUNKS = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
NBYTES = ChunkCodec(128).encoded_nbytes(SHAPE, torch.bfloat16)


def manager(path: Path, **serde: object) -> StorageManager:
    register()
    adapter = {"type": "fs", "base_path": str(path), "serde": {"type": "fibkv", "head_dim": 128, **serde}}
    memory = L1MemoryManagerConfig(size_in_bytes=64 << 20, use_lazy=False, init_size_in_bytes=64 << 20)
    return StorageManager(
        StorageManagerConfig(
            l1_manager_config=L1ManagerConfig(memory_config=memory),
            eviction_config=EvictionConfig(eviction_policy="LRU"),
            l2_adapter_config=parse_args_to_l2_adapters_config(argparse.Namespace(l2_adapter=[json.dumps(adapter)])),
        )
    )


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[Path]:
    """A directory with three chunks."""
    storage = manager(tmp_path)
    reserved = storage.reserve_write(KEYS, LAYOUT)
    for key, chunk in zip(KEYS, CHUNKS, strict=True):
        reserved[key].tensor.copy_(chunk)
    storage.finish_write(KEYS)
    deadline = time.monotonic() + 20
    while len(list(tmp_path.glob("**/*.data"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    storage.close()
    return tmp_path


def fetched(path: Path, **serde: object) -> tuple[int, list[Tensor]]:
    """Hits in a fresh manager, and what they are."""
    storage = manager(path, **serde)
    handle = storage.submit_prefetch_task(PrefetchTaskSpec([GroupedObjectKeys(KEYS, 0, LAYOUT)]))
    assert storage.wait_prefetch_status(handle, 20)
    hits = storage.query_prefetch_status(handle).hit_cells[0].popcount()
    found = []
    if hits:
        with storage.read_prefetched_results(KEYS[:hits]) as objects:
            found = [one.tensor.clone() for one in objects]
        storage.finish_read_prefetched(KEYS[:hits])
    storage.close()
    return hits, found


def test_chunks_are_stored_small_and_come_back(stored: Path) -> None:
    assert {path.stat().st_size for path in stored.glob("**/*.data")} == {NBYTES}
    assert SHAPE.numel() * 2 / 3.6 > NBYTES
    hits, found = fetched(stored)
    assert hits == 3
    for exact, one in zip(CHUNKS.float(), found, strict=True):
        assert 0.004 < (one.float() - exact).square().mean() / exact.square().mean() < 0.012


def test_what_is_damaged_or_of_another_codec_is_a_miss(stored: Path) -> None:
    assert fetched(stored, values="scalar4")[0] == 0
    first = min(stored.glob("**/*.data"))
    data = bytearray(first.read_bytes())
    data[-500] ^= 1
    first.write_bytes(data)
    assert fetched(stored)[0] < 3


def test_options_are_checked() -> None:
    register()
    for options in ({}, {"head_dim": 128, "bits": 4}):
        with pytest.raises(ContractError, match="lmcache serde fibkv"):
            create_serde_processor(SerdeConfig("fibkv", options))
    with pytest.raises(ContractError, match="parameters name"):
        create_serde_processor(SerdeConfig("fibkv", {"head_dim": 128, "keys": "fib9"}))
    create_serde_processor(SerdeConfig("fibkv", {"head_dim": 64, "keys": "fib4", "values": "fib2"})).close()
