"""How stored bytes are taken apart and put together again, so that what was changed inside reaches the parsers.

A form splits bytes into a JSON text and parts, and joins them with the sizes and digests that belong to them. Digests
stand in the text as ``@name`` meanwhile: an attacker would compute them too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from safetensors import SafetensorError
from safetensors.torch import load

from fibkv.artifact import MAGIC
from fibkv.calibration_file import tensors_digest
from fibkv.codebook_file import codebook_digest
from fibkv.container import Container, Kind, pack
from fibkv.contract import MarkedContract
from fibkv.digest import digest
from fibkv.errors import FibkvError
from fibkv.profile import Profile
from fibkv.shape import KVShape

NO_DIGEST = "blake3:" + "0" * 64
BROKEN = (FibkvError, SafetensorError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError)
"""What comes of taking apart or computing digests of bytes that are damaged already."""


class Form(Protocol):
    """Of one kind of bytes."""

    inner: Form | None
    """Of the parts, if they have one."""

    def split(self, data: bytes) -> tuple[bytes, list[bytes]]:
        """The JSON text, and the parts. Raises one of `BROKEN` for bytes that are not of this form."""
        ...

    def join(self, text: bytes, parts: list[bytes]) -> bytes:
        """The inverse, for whatever text and parts."""
        ...


@dataclass(frozen=True)
class Text:
    """Nothing but JSON."""

    inner: Form | None = None

    def split(self, data: bytes) -> tuple[bytes, list[bytes]]:
        return data, []

    def join(self, text: bytes, parts: list[bytes]) -> bytes:
        return text


@dataclass(frozen=True)
class Sections:
    """A container of docs/FORMAT.md; parts that are containers are named by their digests in the header."""

    kind: Kind
    inner: Form | None = None

    def split(self, data: bytes) -> tuple[bytes, list[bytes]]:
        container = Container.parse(data, self.kind)
        text, parts = container.header, [bytes(section) for section in container.sections]
        for index, part in enumerate(parts):
            text = text.replace(stated_digest(part).encode(), f"@{index}".encode())
        return text, parts

    def join(self, text: bytes, parts: list[bytes]) -> bytes:
        for index, part in enumerate(parts):
            text = text.replace(f'"@{index}"'.encode(), f'"{stated_digest(part)}"'.encode())
        return pack(self.kind, text, parts)


@dataclass(frozen=True)
class Archive:
    """An artifact."""

    inner: Form | None = None

    def split(self, data: bytes) -> tuple[bytes, list[bytes]]:
        start = len(MAGIC) + 8
        stop = start + int.from_bytes(data[len(MAGIC) : start], "little")
        text = data[start:stop]
        names = {self._digest(text, name, contract): f"@{name}" for name, contract in _BOUND.items()}
        for found, name in names.items():
            text = text.replace(found.encode(), name.encode())
        return text, [data[stop:]]

    def join(self, text: bytes, parts: list[bytes]) -> bytes:
        # The shape first: its digest is in the profile.
        for name, contract in _BOUND.items():
            text = text.replace(f"@{name}".encode(), self._digest(text, name, contract).encode())
        return b"".join([MAGIC, len(text).to_bytes(8, "little"), text, *parts])

    def _digest(self, text: bytes, name: str, contract: type[MarkedContract]) -> str:
        return computed(lambda: contract.from_json(json.dumps(json.loads(text)[name])).digest())


_BOUND: dict[str, type[MarkedContract]] = {"shape": KVShape, "profile": Profile}


@dataclass(frozen=True)
class Tensors:
    """A safetensors file with one entry of metadata, in which the tensors' digest stands.

    Attributes:
        entry: its name.
        of_tensors: the digest of the tensors in the file's bytes.
    """

    entry: str
    of_tensors: Callable[[bytes], str]
    inner: Form | None = None

    def split(self, data: bytes) -> tuple[bytes, list[bytes]]:
        stop = 8 + int.from_bytes(data[:8], "little")
        names = json.loads(data[8:stop])
        metadata = names.pop("__metadata__")[self.entry]
        metadata = metadata.replace(computed(lambda: self.of_tensors(data)), "@tensors")
        if self.entry == "fibkv":
            metadata = metadata.replace(json.loads(metadata)["digest"], "@stamp")
        return json.dumps([json.loads(metadata), names]).encode(), [data[stop:]]

    def join(self, text: bytes, parts: list[bytes]) -> bytes:
        try:
            metadata, names = json.loads(text)
        except BROKEN:
            metadata, names = None, text.decode(errors="replace")
        data = self._file(None, names, parts)
        written = json.dumps(metadata, separators=(",", ":"))
        written = written.replace("@tensors", computed(lambda: self.of_tensors(data)))
        stamp = computed(lambda: digest(json.loads(written)["info"]["schema_version"], json.loads(written)["info"]))
        return self._file(written.replace("@stamp", stamp), names, parts)

    def _file(self, metadata: str | None, names: object, parts: list[bytes]) -> bytes:
        if isinstance(names, dict) and metadata is not None:
            names = {"__metadata__": {self.entry: metadata}, **names}
        header = json.dumps(names).encode()
        return b"".join([len(header).to_bytes(8, "little"), header, *parts])


def stated_digest(data: bytes) -> str:
    """Of a container; else one that nothing has."""
    return computed(lambda: Container.parse(data).digest)


def computed(call: Callable[[], str]) -> str:
    """A digest, or one that nothing has if it cannot be computed."""
    try:
        return call()
    except BROKEN:
        return NO_DIGEST


def of_calibration(data: bytes) -> str:
    """Digest of a calibration's tensors."""
    return tensors_digest(load(data))


def of_codebook(data: bytes) -> str:
    """Digest of a codebook's words."""
    return codebook_digest(load(data)["codewords"])
