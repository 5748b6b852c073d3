"""Chunks of all layers as containers: exact sizes, and nothing but what was encoded is decoded."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fibkv.chunks import ChunkCodec
from fibkv.container import Container, pack
from fibkv.digest import canonical_json
from fibkv.errors import ContractError, DigestMismatch, EncodingError, PageError
from tests.pages.helpers import gaussian
from tests.store.damage import check_damage_is_seen

LAYERS, TOKENS, HEADS, DIM = 3, 20, 2, 64
CHUNK = gaussian(2, LAYERS, TOKENS, HEADS * DIM)
CODEC = ChunkCodec(DIM, "fib4", "fib2")
DATA = CODEC.encode(CHUNK)


def decoded(data: bytes, codec: ChunkCodec = CODEC, like: Tensor = CHUNK) -> Tensor:
    out = torch.full_like(like, torch.nan)
    codec.decode(data, out)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("roles", [1, 2])
@pytest.mark.parametrize(("keys", "values"), [("fib4", "fib2"), ("int8", "raw"), ("fp8", "fib3")])
def test_sizes_are_known_and_errors_are_the_codecs(keys: str, values: str, roles: int, dtype: torch.dtype) -> None:
    codec, chunk = ChunkCodec(DIM, keys, values), CHUNK[:roles].to(dtype)
    data = codec.encode(chunk)
    assert len(data) == codec.encoded_nbytes(chunk.shape, dtype)
    out = decoded(data, codec, chunk)
    limits = {"raw": 0.0, "int8": 1e-4, "fp8": 2e-3, "fib4": 0.012, "fib3": 0.04, "fib2": 0.14}
    for name, exact, found in zip((keys, values), chunk.float(), out.float(), strict=False):
        for layer in range(LAYERS):
            error = (found - exact)[layer].square().mean() / exact[layer].square().mean()
            assert limits[name] / 4 <= error <= limits[name], (name, layer)


def test_heads_and_layers_do_not_mix() -> None:
    marked = torch.zeros_like(CHUNK)
    marked[1, 2, 7, DIM:] = 5.0
    out = decoded(CODEC.encode(marked))
    assert out[1, 2, 7, DIM:].abs().min() > 0
    out[1, 2, 7, DIM:] = 0
    assert not out.any()


def forged(change: Callable[[dict], object]) -> bytes:
    container = Container.parse(DATA)
    fields = json.loads(container.header)
    change(fields)
    return pack("chunk", canonical_json(fields).encode(), container.sections)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (ChunkCodec(DIM, "fib2", "fib2").encode(CHUNK), "chunk codec: digest mismatch"),
        (ChunkCodec(DIM, "fib4", "fib3").encode(CHUNK), "chunk codec: digest mismatch"),
        (CODEC.encode(CHUNK[:, :, :19]), "chunk: expected"),
        (CODEC.encode(CHUNK[:1]), "chunk: expected"),
        (forged(lambda fields: fields.update(heads=1)), "chunk: expected"),
        (forged(lambda fields: fields.update(nbytes=[1, 1])), "chunk: expected"),
        (forged(lambda fields: fields.update(codecs=fields["codecs"][:1])), "as many as roles"),
        (forged(lambda fields: fields.update(dtype="f64")), "dtype"),
        (pack("chunk", Container.parse(DATA).header, []), "chunk: expected"),
        (pack("end", b"{}", []), "kind: expected chunk, got end"),
        (DATA + bytes(64), "trailing bytes"),
    ],
)
def test_what_is_not_this_chunk_is_refused(data: bytes, message: str) -> None:
    with pytest.raises((PageError, ContractError, DigestMismatch), match=message):
        decoded(data)


def test_no_random_damage_goes_unseen_or_takes_memory() -> None:
    check_damage_is_seen(DATA, decoded, count=100)


def test_what_cannot_be_encoded_is_refused() -> None:
    broken = CHUNK.clone()
    broken[0, 0, 0, 0] = torch.nan
    with pytest.raises(EncodingError):
        CODEC.encode(broken)
    for shape in ([3, 1, 1, DIM], [2, 1, 1, DIM + 1], [2, 1, DIM], [2, 0, 1, DIM]):
        with pytest.raises(ContractError, match=r"chunk: expected \[1 or 2, layers, tokens, heads \* 64\]"):
            CODEC.encode(torch.zeros(shape))
    with pytest.raises(ContractError, match="chunk"):
        CODEC.encoded_nbytes(CHUNK.shape, torch.int8)
    with pytest.raises(ContractError, match="parameters name"):
        ChunkCodec(DIM, "fib9")
