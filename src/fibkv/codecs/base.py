"""What every codec is: parameters in, codes out, with sizes that are known before any byte exists."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fibkv import kernels
from fibkv.codes import Codes
from fibkv.errors import PageError
from fibkv.parameters import CodecParameters
from fibkv.tables import Tables


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor of a codec's codes: ``shape`` of a group of ``T`` tokens, behind the leading axes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes per group."""
        return prod(self.shape) * self.dtype.itemsize


class Codec(ABC):
    """One way to code vectors. Subclasses are flat: `layout`, `assemble`, `check` and their tables.

    Attributes:
        name: as in `CodecParameters.codec`.
        parameters: the contract that this codec was made from.
        tables: what the kernels need.
        codebook_digest: digest of the codebook in use, or ``none:<codec>``.
        rotation_digest: digest of the rotation in use, or ``none:<codec>``.
    """

    parameters: CodecParameters
    tables: Tables
    codebook_digest: str
    rotation_digest: str

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled page names its codec; codebook and rotation are those of the process that reads it.
        return type(self), (self.parameters,)

    @property
    def name(self) -> str:
        """The codec's name in the table of codecs."""
        return self.parameters.codec

    @property
    def head_dim(self) -> int:
        """``d``, elements per vector."""
        return self.parameters.head_dim

    def of_heads(self, start: int, stop: int) -> Codec:
        """The codec of KV heads ``start:stop``: itself, unless it codes each head in its own way."""
        del start, stop
        return self

    @abstractmethod
    def layout(self, tokens: int) -> tuple[Field, ...]:
        """The tensors of one group of ``tokens`` vectors, in canonical order."""

    @abstractmethod
    def assemble(self, tensors: dict[str, Tensor]) -> Codes:
        """Codes from the tensors that `layout` names."""

    @abstractmethod
    def check_fields(self, fields: Mapping[str, Tensor]) -> None:
        """Refuses what no encoder makes.

        Args:
            fields: the tensors that `layout` names, with any leading axes; those that are free or empty may be missing.

        Raises:
            PageError: with the field and the value.
        """

    def check(self, codes: Codes) -> None:
        """`check_fields` of all fields of codes."""
        self.check_fields(dict(codes.named()))

    @property
    def free_fields(self) -> frozenset[str]:
        """Fields whose every bit pattern is one that an encoder makes: there is nothing to check about them."""
        return frozenset()

    @property
    def vector_nbytes(self) -> int:
        """Bytes that each further vector of a group takes: fixed, so that addresses are arithmetic."""
        return self.encoded_nbytes(1, 2) - self.encoded_nbytes(1, 1)

    def encoded_nbytes(self, groups: int, tokens: int) -> int:
        """Exact bytes of the codes of ``groups`` groups (heads, rows, pages) of ``tokens`` vectors each."""
        return groups * sum(field.nbytes for field in self.layout(tokens))

    def encode(self, rows: Tensor, *, implementation: str = "auto") -> Codes:
        """Encodes ``rows [..., T, d]``: each group of T vectors on its own, whatever stands beside it.

        Raises:
            EncodingError: a vector that the codec cannot represent.
            KernelError: rows of another shape or dtype.
        """
        return kernels.encode(rows, self.tables, implementation=implementation)

    def decode(self, codes: Codes, *, out: Tensor | None = None, implementation: str = "auto") -> Tensor:
        """Decodes to ``[..., T, d]``, float32 unless ``out`` says otherwise. The values are approximate."""
        return kernels.decode(codes, self.tables, out=out, implementation=implementation)

    def to_bytes(self, codes: Codes) -> bytes:
        """The codes in canonical order, every tensor contiguous and little endian."""
        return b"".join(tensor_bytes(tensor) for _, tensor in codes.named())

    def from_bytes(self, data: memoryview, groups: int, tokens: int) -> Codes:
        """Codes with leading axis ``[groups]`` from their canonical bytes, copied out of ``data``.

        Raises:
            PageError: ``data`` has another length, or holds what no encoder makes.
        """
        expected = self.encoded_nbytes(groups, tokens)
        if len(data) != expected:
            raise PageError(f"{self.name} codes: expected {expected} bytes, got {len(data)}")
        tensors: dict[str, Tensor] = {}
        offset = 0
        for field in self.layout(tokens):
            nbytes = groups * field.nbytes
            tensors[field.name] = _tensor(data[offset : offset + nbytes], field.dtype, (groups, *field.shape))
            offset += nbytes
        codes = self.assemble(tensors)
        self.check(codes)
        return codes

    def check_bytes(self, parts: Sequence[memoryview], groups: int, tokens: int) -> None:
        """Checks the canonical bytes of many codes of ``groups`` groups at once. Fields that are free are not read.

        Raises:
            PageError: one of them holds what no encoder makes.
        """
        fields: dict[str, Tensor] = {}
        free, offset = self.free_fields, 0
        for field in self.layout(tokens):
            stop = offset + groups * field.nbytes
            if field.nbytes and field.name not in free:
                together = b"".join([part[offset:stop] for part in parts])
                fields[field.name] = _tensor(memoryview(together), field.dtype, (groups * len(parts), *field.shape))
            offset = stop
        self.check_fields(fields)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in C order, little endian (torch runs on no other machine): its own where they are so."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _tensor(data: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not len(data):
        return torch.empty(shape, dtype=dtype)
    # bytearray: torch must own memory that it may write to.
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).view(shape)


def require(condition: Tensor | npt.NDArray[np.bool_], field: str, rule: str) -> None:
    """Refuses codes of which an element breaks a rule.

    Args:
        condition: True where the rule holds.
        field: the codes' field.
        rule: what was expected.

    Raises:
        PageError: naming the field, the rule and the number of broken elements.
    """
    if not bool(condition.all()):
        broken, count = int((~condition).sum()), prod(condition.shape)
        raise PageError(f"codes field {field!r}: expected {rule}, {broken} of {count} elements are not")
