"""Chunks of keys and values of all layers as one container: what caches of serving engines store and send.

A chunk carries no policy and no protected regions: whoever cuts a cache into chunks says where their edges are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from fibkv.codecs import Codec, codec_for
from fibkv.codecs.raw import TORCH_DTYPES
from fibkv.container import Bytes, Container, canonical, pack, packed_nbytes
from fibkv.contract import Contract, Count, Total
from fibkv.digest import Digest, digest, require_digest
from fibkv.errors import ContractError, PageError
from fibkv.parameters import named_parameters
from fibkv.shape import Dtype
from fibkv.view import DTYPE_NAMES

CODEC_DOMAIN = "fibkv_chunk_codec_v1"


class ChunkHeader(Contract):
    """A chunk without its codes.

    Attributes:
        roles: 2 for keys and values, 1 for latents that stand for both.
        layers: of the model.
        tokens: of the chunk.
        heads: KV heads.
        head_dim: d.
        dtype: of the vectors before they were coded.
        codecs: per role, digest of codec parameters, codebook and rotation.
        nbytes: per role, of the codes.
    """

    roles: Literal[1, 2]
    layers: Count
    tokens: Count
    heads: Count
    head_dim: Count
    dtype: Dtype
    codecs: tuple[Digest, ...]
    nbytes: tuple[Total, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not len(self.codecs) == len(self.nbytes) == self.roles:
            raise ContractError("ChunkHeader.codecs", f"as many as roles ({self.roles})", self.codecs)
        return self


class ChunkCodec:
    """Codes chunks ``[roles, layers, tokens, heads * d]``: keys and values, or with one role latents, as keys are.

    Sizes are known before: they depend on shape and dtype alone.

    Args:
        head_dim: d.
        keys: name of a codec, see `fibkv.parameters.PARAMETER_NAMES`.
        values: likewise.
        implementation: of the kernels.

    Raises:
        ContractError: an unknown codec, or one that does not fit ``head_dim``.
    """

    def __init__(
        self, head_dim: int, keys: str = "fib4", values: str = "fib4", *, implementation: str = "auto"
    ) -> None:
        self.head_dim = head_dim
        self.names = (keys, values)
        self.implementation = implementation
        for name in self.names:
            named_parameters(name, head_dim, "f32")

    def encoded_nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Exact bytes of the container of a chunk of this shape and dtype.

        Raises:
            ContractError: no chunk has it.
        """
        header = self._header(shape, dtype)
        return packed_nbytes(len(header.to_json().encode()), header.nbytes)

    def encode(self, chunk: Tensor) -> bytes:
        """The container of ``chunk [roles, layers, tokens, heads * d]``.

        Raises:
            ContractError: another shape or dtype.
            EncodingError: vectors that a codec cannot represent, such as NaN.
        """
        header = self._header(chunk.shape, chunk.dtype)
        groups = chunk.unflatten(-1, (header.heads, header.head_dim)).transpose(2, 3)
        sections = []
        for codec, rows in zip(self._codecs(header), groups, strict=True):
            codes = codec.encode(rows.flatten(0, 1).contiguous(), implementation=self.implementation)
            sections.append(codec.to_bytes(codes))
        return pack("chunk", header.to_json().encode(), sections)

    def decode(self, data: Bytes, out: Tensor) -> None:
        """Decodes a container into ``out [roles, layers, tokens, heads * d]``, which has the shape that was encoded.

        Args:
            data: the container, and nothing behind it.
            out: of any floating dtype.

        Raises:
            DigestMismatch: damaged, or coded by another codec, codebook or rotation.
            PageError, ContractError: no chunk, one of another shape, or codes that no encoder makes. Nothing has been
                written then, except by codes of a later role.
        """
        container = Container.read(data, "chunk")
        header = canonical(container, ChunkHeader)
        expected = self._header(out.shape, TORCH_DTYPES[header.dtype])
        for stated, own in zip(header.codecs, expected.codecs, strict=False):
            require_digest("chunk codec", own, stated)
        if header != expected or [len(one) for one in container.sections] != list(header.nbytes):
            raise PageError(f"chunk: expected {expected}, got {header}")
        groups = header.layers * header.heads
        codecs = self._codecs(header)
        coded = [
            codec.from_bytes(section, groups, header.tokens)
            for codec, section in zip(codecs, container.sections, strict=True)
        ]
        for codec, codes, role in zip(codecs, coded, out, strict=True):
            rows = codec.decode(codes, implementation=self.implementation)
            role.copy_(rows.unflatten(0, (header.layers, header.heads)).transpose(1, 2).flatten(2))

    def _codecs(self, header: ChunkHeader) -> list[Codec]:
        return [codec_for(named_parameters(name, self.head_dim, header.dtype)) for name in self.names[: header.roles]]

    def _header(self, shape: Sequence[int], dtype: torch.dtype) -> ChunkHeader:
        is_chunk = len(shape) == 4 and shape[0] in (1, 2) and shape[3] % self.head_dim == 0 and dtype in DTYPE_NAMES
        if not is_chunk or not all(shape):
            expected = f"[1 or 2, layers, tokens, heads * {self.head_dim}] of float16, bfloat16 or float32"
            raise ContractError("chunk", expected, f"{list(shape)} {dtype}")
        roles, layers, tokens, heads = shape[0], shape[1], shape[2], shape[3] // self.head_dim
        codecs = [codec_for(named_parameters(name, self.head_dim, DTYPE_NAMES[dtype])) for name in self.names[:roles]]
        return ChunkHeader(
            roles=roles,  # type: ignore[arg-type]  # checked above
            layers=layers,
            tokens=tokens,
            heads=heads,
            head_dim=self.head_dim,
            dtype=DTYPE_NAMES[dtype],
            codecs=tuple(
                digest(CODEC_DOMAIN, (codec.parameters, codec.codebook_digest, codec.rotation_digest))
                for codec in codecs
            ),
            nbytes=tuple(codec.encoded_nbytes(layers * heads, tokens) for codec in codecs),
        )
