"""8-bit log norms in C++ against the reference: the same codes bit for bit, on every instruction set here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fibkv.codes import FibCodes
from fibkv.errors import EncodingError
from fibkv.kernels import reference_norms

native = pytest.importorskip("fibkv.kernels._native", reason="the native kernels were not compiled")
native_norms = pytest.importorskip("fibkv.kernels.native_norms")

each_isa = pytest.mark.parametrize(
    "isa",
    [isa for isa in (native.Isa.portable, native.Isa.avx2, native.Isa.avx512) if native.has_isa(isa)],
    ids=lambda isa: isa.name,
)


def norms_of(tokens: int, centre: float, octaves: float) -> Tensor:
    """``[7, tokens]`` float64: over some octaves, of float32, powers of two, equal ones, with zeros, all zero, and ones
    between two codes, where they are or next to that."""
    generator = torch.Generator().manual_seed(tokens)
    place = torch.rand(7, tokens, generator=generator, dtype=torch.float64) - 0.5
    norms = torch.exp2(place * octaves + centre)
    norms[1] = norms[1].float().double()
    norms[2] = torch.exp2(norms[2].log2().round())
    norms[3] = norms[3, 0]
    norms[4, ::3] = 0
    norms[5] = 0
    low, step = reference_norms.encode_norms(norms[6:], "log8")[1].double().unbind(-1)
    steps = torch.randint(0, 254, (tokens,), generator=generator) + 0.5
    steps += 1e-6 * torch.randn(tokens, generator=generator, dtype=torch.float64).round()
    between = torch.exp2(low + steps * step)
    norms[6] = torch.where((between > norms[6].min()) & (between < norms[6].max()), between, norms[6])
    return norms


@each_isa
@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 1000])
@pytest.mark.parametrize(("centre", "octaves"), [(0, 0.01), (3, 1), (-20, 8), (0, 200), (-141, 14), (120, 14)])
def test_codes_equal_the_reference(tokens: int, centre: float, octaves: float, isa: object) -> None:
    norms = norms_of(tokens, centre, octaves)
    expected, found = reference_norms.encode_norms(norms, "log8"), native_norms.encode(norms, isa)
    for a, b in zip(expected, found, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    codes = FibCodes(mean=torch.empty(7, 0), norm_range=found[1], norms=found[0], indices=torch.empty(7, tokens, 0))
    decoded, wanted = native_norms.decode(codes, isa), reference_norms.decode_norms(*found)
    assert ((decoded - wanted).abs() <= 4e-7 * wanted + 2.0**-149).all()


@each_isa
def test_norms_beyond_float32_are_refused(isa: object) -> None:
    norms = torch.ones(2, 40, dtype=torch.float64)
    norms[1, 33] = 2.0**128
    with pytest.raises(EncodingError, match="norms must be finite in float32"):
        native_norms.encode(norms, isa)
