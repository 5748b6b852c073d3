"""Codes that no encoder makes are refused by name, whatever digest comes with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fibkv.codecs import codec_for
from fibkv.codes import ScaledCodes
from fibkv.errors import PageError
from fibkv.parameters import AffineParameters, FibParameters, Fp8Parameters, Int8Parameters, RawParameters
from tests.codecs.conformance import gaussian


class TestRefusedCodes:
    def refuse(self, codec: object, codes: object, match: str) -> None:
        data = codec.to_bytes(codes)
        with pytest.raises(PageError, match=match):
            codec.from_bytes(memoryview(data), 1, 2)

    def test_scaled(self) -> None:
        codec = codec_for(Int8Parameters(head_dim=64))
        codes = codec.encode(gaussian(1, 2, 64))
        bad = codes.values.clone()
        bad[0, 1, 3] = -128
        self.refuse(codec, ScaledCodes(codes.scales, bad), r"'values': expected numbers in -127..127, 1 of 128")
        self.refuse(codec, ScaledCodes(-codes.scales, codes.values), "'scales': expected finite numbers >= 0, 2 of 2")
        self.refuse(codec, ScaledCodes(codes.scales * torch.nan, codes.values), "'scales'")

    def test_fp8_nan(self) -> None:
        codec = codec_for(Fp8Parameters(head_dim=64))
        codes = codec.encode(gaussian(1, 2, 64))
        codes.values.view(torch.uint8)[0, 0, 0] = 0x7F
        self.refuse(codec, codes, r"'values': expected numbers in -448..448, 1 of 128")

    def test_fib(self) -> None:
        codec = codec_for(FibParameters.of(64, 2, 256, norm_format="f16"))
        codes = codec.encode(gaussian(1, 2, 64))
        self.refuse(codec, replace(codes, norms=codes.norms * torch.inf), "'norms'")
        log8 = codec_for(FibParameters.of(64, 2, 256))
        codes = log8.encode(gaussian(1, 2, 64))
        self.refuse(log8, replace(codes, norm_range=codes.norm_range * torch.nan), "'norm_range'")
        huge = torch.tensor([[120.0, 1.0]], dtype=torch.float16)
        self.refuse(log8, replace(codes, norm_range=huge), "norms within float32")

    @pytest.mark.parametrize(("place", "number", "match"), [(0, 121, "power of two in -126..120"), (5, -128, "-127")])
    def test_means(self, place: int, number: int, match: str) -> None:
        codec = codec_for(FibParameters.of(64, 2, 256, centered=True))
        codes = codec.encode(gaussian(1, 2, 64))
        codes.mean[0, place] = number
        self.refuse(codec, codes, f"'mean': expected .*{match}")

    @pytest.mark.parametrize("axis", ["per_token", "per_channel"])
    def test_affine(self, axis: str) -> None:
        codec = codec_for(AffineParameters(head_dim=33, bits=2), axis)
        codes = codec.encode(gaussian(1, 2, 33))
        self.refuse(codec, replace(codes, grid=codes.grid * torch.nan), "'grid': expected finite numbers")
        self.refuse(codec, replace(codes, grid=-codes.grid.abs()), "'grid': expected steps >= 0")
        codes.values[0, 1, -1] |= 0x80
        self.refuse(codec, codes, "zero bits behind the last number")

    def test_stray_bits(self) -> None:
        codec = codec_for(FibParameters.of(20, 2, 64))  # 10 indices of 6 bits: 4 filling bits
        codes = codec.encode(gaussian(1, 2, 20))
        codes.indices[0, 1, -1] |= 0x80
        self.refuse(codec, codes, "zero bits behind the last index")

    def test_raw(self) -> None:
        codec = codec_for(RawParameters(head_dim=64, dtype="f16"))
        codes = codec.encode(gaussian(1, 2, 64))
        codes.values[0, 0, 0] = torch.inf
        self.refuse(codec, codes, r"'values': expected finite numbers, 1 of 128")
