"""Choosing an implementation, and merging parts."""

from __future__ import annotations

import pytest
import torch

from fibkv import kernels
from fibkv.codecs import codec_for
from fibkv.errors import KernelError
from fibkv.kernels import triton
from fibkv.parameters import Int8Parameters, RawParameters
from tests.codecs.conformance import gaussian


def test_available_names_what_auto_tries() -> None:
    available = kernels.available()
    assert list(available) == ["native", "native-avx512", "native-avx2", "native-portable", "triton", "reference"]
    assert available["reference"] == "yes"
    expected = "native" if available["native"] == "yes" else "reference"
    assert kernels.resolve("auto") is kernels.resolve(expected)


def test_auto_on_cuda_is_triton_where_it_runs() -> None:
    cuda = torch.device("cuda")
    expected = kernels.resolve("triton", cuda) if triton.why_not("cuda") == "yes" else kernels.resolve("reference")
    assert kernels.resolve("auto", cuda) is expected
    assert kernels.resolve("auto", torch.device("meta")) is kernels.resolve("reference")


def test_unknown_and_misplaced_implementations_are_refused() -> None:
    with pytest.raises(KernelError, match=r"expected one of auto, native, native-avx512, .*reference, got 'cuda'"):
        kernels.resolve("cuda")
    with pytest.raises(KernelError, match="'native': expected tensors on the CPU, got cuda"):
        kernels.resolve("native", torch.device("cuda"))
    with pytest.raises(
        KernelError, match=r"triton kernels: (expected tensors on a CUDA device, got meta|triton is not)"
    ):
        kernels.resolve("triton", torch.device("meta"))


def test_merged_parts_equal_the_whole() -> None:
    codec = codec_for(RawParameters(head_dim=16, dtype="f32"))
    rows, values, query = gaussian(2, 30, 16), gaussian(2, 30, 16, seed=1), gaussian(2, 5, 16, seed=2)

    def attend(start: int, stop: int, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        keys, mixed = codec.encode(rows[:, start:stop]), codec.encode(values[:, start:stop])
        return kernels.attend(query, keys, codec.tables, mixed, codec.tables, scale=0.3, mask=mask)

    nothing = torch.zeros(2, 5, 10, dtype=torch.bool)
    parts = [attend(0, 7), attend(7, 20), attend(20, 30), attend(0, 10, nothing)]
    outs, lses = (torch.stack(side) for side in zip(*parts, strict=True))
    for actual, expected in zip(kernels.merge(outs, lses), attend(0, 30), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    empty, lse = kernels.merge(outs[3:], lses[3:])
    assert not empty.any()
    assert (lse == -torch.inf).all()


def test_codes_and_tables_must_belong_together() -> None:
    raw, int8 = codec_for(RawParameters(head_dim=16, dtype="f32")), codec_for(Int8Parameters(head_dim=16))
    with pytest.raises(KernelError, match="RawCodes cannot be read with ScaledTables"):
        int8.decode(raw.encode(gaussian(1, 2, 16)))


def test_queries_of_another_width_are_refused() -> None:
    codec = codec_for(Int8Parameters(head_dim=16))
    codes = codec.encode(gaussian(1, 2, 16))
    with pytest.raises(KernelError, match=r"expected head_dim 16 of the keys, got shape \[1, 1, 8\]"):
        kernels.attend(gaussian(1, 1, 8), codes, codec.tables, codes, codec.tables, scale=1.0)
