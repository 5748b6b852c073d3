"""LMCache: chunks in its remote and local tiers are stored in codes of fibkv.

    python -m fibkv.lmcache server ...        as `lmcache server ...`, with the serde "fibkv" registered

In an L2 adapter's configuration: ``"serde": {"type": "fibkv", "head_dim": 128, "keys": "fib4", "values": "fib2"}``.
The serde's registry is filled before LMCache makes its adapters, hence the command of our own.
"""

from __future__ import annotations

from typing import Any

import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.serde import AsyncSerdeProcessor
from lmcache.v1.distributed.serde.base import Deserializer, SerdeProcessor, Serializer
from lmcache.v1.distributed.serde.factory import get_registered_serde_types, register_serde_factory
from lmcache.v1.memory_management import MemoryObj

from fibkv.chunks import ChunkCodec
from fibkv.errors import ContractError

NAME = "fibkv"
_OPTIONS = ("head_dim", "keys", "values", "max_workers")


class ChunkSerializer(Serializer):  # type: ignore[misc]  # LMCache ships no types
    """Chunks ``[2, layers, tokens, heads * d]`` (or with a leading 1, latents) to containers of fixed size."""

    def __init__(self, codec: ChunkCodec) -> None:
        self.codec = codec

    def serialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> int:  # noqa: ARG002 - LMCache's interface
        """Writes the container of ``src`` to the beginning of ``dst``; returns its bytes."""
        data = self.codec.encode(src.tensor)
        _bytes_of(dst)[: len(data)].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return len(data)

    def estimate_serialized_size(self, layout_desc: MemoryLayoutDesc) -> int:
        """Exact bytes of the container.

        Raises:
            ContractError: more than one tensor to an object, or another shape than a chunk's.
        """
        if len(layout_desc.shapes) != 1:
            raise ContractError("chunk", "one tensor", f"{len(layout_desc.shapes)} tensors")
        return self.codec.encoded_nbytes(tuple(layout_desc.shapes[0]), layout_desc.dtypes[0])


class ChunkDeserializer(Deserializer):  # type: ignore[misc]
    """Containers back to chunks; what is damaged or of another codec is refused, which LMCache counts as a miss."""

    def __init__(self, codec: ChunkCodec) -> None:
        self.codec = codec

    def deserialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> None:  # noqa: ARG002
        """Decodes the container at the beginning of ``src`` into ``dst``."""
        nbytes = self.codec.encoded_nbytes(tuple(dst.tensor.shape), dst.tensor.dtype)
        self.codec.decode(_bytes_of(src)[:nbytes].cpu().numpy().data, dst.tensor)


def make_serde(options: dict[str, Any]) -> SerdeProcessor:
    """The serde of a configuration: ``head_dim``, and optionally ``keys``, ``values`` (codecs) and ``max_workers``.

    Raises:
        ContractError: an option that is unknown or missing, or codecs that do not fit.
    """
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown or "head_dim" not in options:
        raise ContractError("lmcache serde fibkv", f"head_dim, and nothing but {', '.join(_OPTIONS)}", sorted(options))
    codecs = {name: str(options[name]) for name in ("keys", "values") if name in options}
    codec = ChunkCodec(int(options["head_dim"]), **codecs)
    return AsyncSerdeProcessor(
        ChunkSerializer(codec), ChunkDeserializer(codec), max_workers=int(options.get("max_workers", 1))
    )


def register() -> None:
    """Makes the serde known to LMCache as `NAME`."""
    if NAME not in get_registered_serde_types():
        register_serde_factory(NAME, make_serde)


def _bytes_of(memory: MemoryObj) -> torch.Tensor:
    flat: torch.Tensor = memory.tensor.flatten().view(torch.uint8)
    return flat


def main() -> None:
    """LMCache's own command line, with the serde registered."""
    from lmcache.cli.main import main as lmcache  # noqa: PLC0415 - it looks at its arguments

    register()
    lmcache()


if __name__ == "__main__":
    main()
