"""A process with LMCache's storage manager: `python -m tests.lmcache.worker store|load ADAPTER...`, answers in JSON.

`store` puts the chunks into the tier of an adapter and stays until its input is closed; `load` fetches them from the
tier of each adapter in turn.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lmcache.v1.distributed.api import GroupedObjectKeys, MemoryLayoutDesc, ObjectKey, PrefetchTaskSpec
from lmcache.v1.distributed.config import EvictionConfig, L1ManagerConfig, L1MemoryManagerConfig, StorageManagerConfig
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.distributed.storage_manager import StorageManager

from fibkv.lmcache import register

SHAPE = torch.Size([2, 4, 64, 256])
LAYOUT = MemoryLayoutDesc([SHAPE], [torch.bfloat16])
KEYS = [ObjectKey(chunk_hash=bytes([number]) * 32, model_name="test", kv_rank=0) for number in range(3)]
CHUNKS = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


@contextmanager
def manager(adapter: str) -> Iterator[StorageManager]:
    """A manager with one tier, of an adapter in JSON."""
    register()
    memory = L1MemoryManagerConfig(size_in_bytes=64 << 20, use_lazy=False, init_size_in_bytes=64 << 20)
    storage = StorageManager(
        StorageManagerConfig(
            l1_manager_config=L1ManagerConfig(memory_config=memory),
            eviction_config=EvictionConfig(eviction_policy="LRU"),
            l2_adapter_config=parse_args_to_l2_adapters_config(argparse.Namespace(l2_adapter=[adapter])),
        )
    )
    try:
        yield storage
    finally:
        storage.close()


def store(adapter: str) -> None:
    """Stores the chunks, which LMCache does in the background: stays until its input is closed."""
    with manager(adapter) as storage:
        reserved = storage.reserve_write(KEYS, LAYOUT)
        for key, chunk in zip(KEYS, CHUNKS, strict=True):
            reserved[key].tensor.copy_(chunk)
        storage.finish_write(KEYS)
        sys.stdin.read()


def load(adapter: str) -> list[float]:
    """Fetches the chunks into a new manager; the relative square errors of those that it found."""
    with manager(adapter) as storage:
        handle = storage.submit_prefetch_task(PrefetchTaskSpec([GroupedObjectKeys(KEYS, 0, LAYOUT)]))
        assert storage.wait_prefetch_status(handle, 60)
        hits = storage.query_prefetch_status(handle).hit_cells[0].popcount()
        if not hits:
            return []
        with storage.read_prefetched_results(KEYS[:hits]) as objects:
            found = [one.tensor.float() for one in objects]
        storage.finish_read_prefetched(KEYS[:hits])
    return [
        float((one - exact).square().mean() / exact.square().mean())
        for exact, one in zip(CHUNKS.float(), found, strict=False)
    ]


if __name__ == "__main__":
    if sys.argv[1] == "store":
        store(sys.argv[2])
    else:
        print(json.dumps([load(adapter) for adapter in sys.argv[2:]]))
