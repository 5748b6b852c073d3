"""The examples of docs/CODECS.md run: what it says of a codec of one's own is what the package asks for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fibkv import kernels
from fibkv.codecs import Codec
from fibkv.errors import EncodingError, PageError
from fibkv.packing import unpack
from tests.codecs.conformance import equal, gaussian, relative_mse

PAGE = Path(__file__).parents[2] / "docs" / "CODECS.md"


@pytest.fixture(scope="module")
def examples() -> dict[str, Any]:
    """What the page's blocks define, one after another."""
    scope: dict[str, Any] = {"__name__": "examples_of_codecs_md"}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        exec(compile(block, PAGE.name, "exec", dont_inherit=True), scope)
    return scope


def check_bytes(codec: Codec, vector_nbytes: int, codes: Any) -> None:
    """Sizes are those that the layout states, and bytes come back as they were."""
    groups, tokens = codes.axes
    data = codec.to_bytes(codes)
    assert codec.vector_nbytes == vector_nbytes
    assert len(data) == codec.encoded_nbytes(groups, tokens)
    assert equal(codec.from_bytes(memoryview(data), groups, tokens), codes)


@pytest.mark.parametrize("implementation", ["reference", "auto"])
def test_a_codebook_of_ones_own_is_encoded_and_decoded_by_all_kernels(
    examples: dict[str, Any], implementation: str
) -> None:
    codec = examples["GridCodec"](examples["GridParameters"](head_dim=64, rotation="hadamard"))
    rows = gaussian(8, 64, 64)
    codes = codec.encode(rows, implementation=implementation)
    assert equal(codes, codec.encode(rows, implementation="reference"))
    assert relative_mse(rows, codec.decode(codes, implementation=implementation)) == pytest.approx(0.0092, rel=0.1)
    check_bytes(codec, 33, codes)


def test_attention_on_a_codebook_of_ones_own(examples: dict[str, Any]) -> None:
    codec = examples["GridCodec"](examples["GridParameters"](head_dim=64, rotation="hadamard"))
    keys, values = codec.encode(gaussian(2, 40, 64)), codec.encode(gaussian(2, 40, 64, seed=1))
    query, tables = gaussian(2, 3, 64, seed=2), codec.tables
    turned = kernels.rotate(query, tables)
    out, _ = kernels.attend(turned, keys, tables, values, tables, scale=0.125, implementation="reference")
    weights = torch.softmax(query @ codec.decode(keys).transpose(-1, -2) * 0.125, -1)
    torch.testing.assert_close(kernels.unrotate(out, tables), weights @ codec.decode(values), rtol=1e-4, atol=1e-4)


def test_a_code_of_ones_own(examples: dict[str, Any]) -> None:
    codec = examples["Int4Codec"](examples["Int4Parameters"](head_dim=65))
    rows = gaussian(8, 64, 65)
    codes = examples["_encode_int4"](rows)
    check_bytes(codec, 33 + 2, codes)
    # The page's case of the decoder.
    decoded = (unpack(codes.numbers, 65, 4) - 8).float() * codes.scales.float().unsqueeze(-1)
    assert relative_mse(rows, decoded) == pytest.approx(0.012, rel=0.1)
    with pytest.raises(EncodingError, match="finite, got 1 NaN"):
        examples["_encode_int4"](torch.tensor([[1.0, float("nan")]]))


@pytest.mark.parametrize(
    ("byte", "message"), [(0, "'numbers': expected 1..15"), (0xFF, "'numbers': expected zero bits")]
)
def test_what_its_encoder_does_not_make_is_refused(examples: dict[str, Any], byte: int, message: str) -> None:
    codec = examples["Int4Codec"](examples["Int4Parameters"](head_dim=65))
    data = bytearray(codec.to_bytes(examples["_encode_int4"](gaussian(1, 1, 65))))
    data[-1] = byte
    with pytest.raises(PageError, match=message):
        codec.from_bytes(memoryview(data), 1, 1)
