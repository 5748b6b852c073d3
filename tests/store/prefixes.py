"""What the tests of stored prefixes share: two small layers, and prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from fibkv.cache import LayerCache
from fibkv.errors import StoreError
from fibkv.manifest import Binding, ModelIdentity
from fibkv.policy import Policy
from fibkv.quarantine import Quarantine
from fibkv.sealing import LayerSettings
from fibkv.store import Entry, MemoryStore
from tests.pages.helpers import DIM, HEADS, gaussian, layer_settings, protecting

PAGE = 16
POLICY = protecting(first_tokens_raw=4, last_tokens_raw=5)


def layers_settings(policy: Policy = POLICY, codec: str = "fib4") -> list[LayerSettings]:
    return [replace(layer_settings(codec, codec, policy), layer=layer) for layer in range(2)]


def binding(policy: Policy = POLICY, codec: str = "fib4", weights: str = "name:test") -> Binding:
    return Binding(
        model=ModelIdentity(config="blake3:" + "a" * 64, weights=weights, dtype="torch.float32"),
        tokens_per_page=PAGE,
        read_through=False,
        raw_dtype=None,
        policy=policy,
        codecs=((codec, codec),) * 2,
        spaces=(None, None),
    )


def empty_layers(settings: Sequence[LayerSettings] | None = None) -> list[LayerCache]:
    none = torch.zeros(1, HEADS, 0, DIM)
    return [LayerCache(layer, none, none, Quarantine()) for layer in settings or layers_settings()]


def fed(ids: Sequence[int], settings: Sequence[LayerSettings] | None = None) -> list[LayerCache]:
    """Layers that have seen tokens: keys and values are a function of layer, position and the ids up to there."""
    layers = empty_layers(settings)
    for layer in layers:
        rows = [
            gaussian(2, HEADS, DIM, seed=hash((layer.settings.layer, *ids[: i + 1])) % 2**31) for i in range(len(ids))
        ]
        keys, values = torch.stack(rows).permute(1, 2, 0, 3)[:, None]
        layer.append(keys, values)
    return layers


def same(ours: Sequence[LayerCache], theirs: Sequence[LayerCache]) -> bool:
    """Whether layers hold the same, bit for bit: pages by digest, recomputed, and tails."""

    def held(layer: LayerCache) -> tuple[object, ...]:
        tail = layer.tail
        raw = [tensor[:, :, : tail.length].tolist() for tensor in (tail.keys, tail.values)]
        return layer.length, [page.compute_digest() for page in layer.rows[0]], raw

    return [held(layer) for layer in ours] == [held(layer) for layer in theirs]


class FailingStore(MemoryStore):
    """Fails where it is told to: ``fails(operation, key)``."""

    def __init__(self, fails: Callable[[str, str], bool]) -> None:
        super().__init__()
        self.fails = fails

    def _ask(self, operation: str, key: str) -> None:
        if self.fails(operation, key):
            raise StoreError(f"{operation} {key[:8]}: the disk is on fire")

    def get(self, key: str) -> bytes | None:
        self._ask("get", key)
        return super().get(key)

    def put(self, key: str, data: bytes | memoryview) -> None:
        self._ask("put", key)
        super().put(key, data)

    def exists(self, key: str) -> bool:
        self._ask("exists", key)
        return super().exists(key)

    def delete(self, key: str) -> None:
        self._ask("delete", key)
        super().delete(key)

    def list(self, folder: str = "") -> Iterator[Entry]:
        self._ask("list", folder)
        return super().list(folder)

    def touch(self, keys: Sequence[str]) -> None:
        self._ask("touch", keys[0])
        super().touch(keys)
