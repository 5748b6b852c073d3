"""FibQuant: what norms, gains, searches, rotations and books are worth."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fibkv import kernels
from fibkv.codecs import codec_for
from fibkv.codecs.fib import unit_distortion
from fibkv.decision_table import decision_table
from fibkv.errors import PageError
from fibkv.parameters import FibParameters
from tests.codecs.conformance import gaussian, relative_mse


def test_log_norm_costs_little() -> None:
    """8-bit log norms against float16 ones: notes say +0.5 % at 4 bits over 8 octaves."""
    rows = gaussian(8, 64, 128) * torch.exp2(torch.rand(8, 64, 1, generator=torch.Generator().manual_seed(1)) * 8)
    half, log8 = (codec_for(FibParameters.of(128, 2, 256, norm_format=name)) for name in ("f16", "log8"))
    errors = [
        float(((rows - codec.decode(codec.encode(rows))).square().sum(-1) / rows.square().sum(-1)).mean())
        for codec in (half, log8)
    ]
    assert errors[1] < 1.01 * errors[0]


def test_gain_lowers_the_error_of_every_vector() -> None:
    rows = gaussian(1, 512, 64)
    plain, gained = (
        codec_for(FibParameters.of(64, 2, 256, norm_format="f16", gain_corrected=flag)) for flag in (False, True)
    )
    errors = [(rows - codec.decode(codec.encode(rows))).square().sum(-1) for codec in (plain, gained)]
    # Up to the rounding of the float16 norm.
    assert (errors[1] <= errors[0] * (1 + 1e-3) + 1e-6 * rows.square().sum(-1)).all()
    assert errors[1].mean() < errors[0].mean() * 0.985


@pytest.mark.parametrize(
    ("block_dim", "size", "gained"), [(2, 256, 0.095), (1, 16, 0.12), (2, 64, 0.045), (4, 256, 0.01)]
)
def test_scale_search_lowers_the_error(block_dim: int, size: int, gained: float) -> None:
    rows = gaussian(4, 128, 128)
    errors = []
    for search in (False, True):
        codec = codec_for(FibParameters.of(128, block_dim, size, scale_search=search))
        errors.append(relative_mse(rows, codec.decode(codec.encode(rows))))
    assert errors[1] < (1 - gained) * errors[0]


def test_scale_search_keeps_the_factor_with_the_smallest_angle() -> None:
    """By hand: the codes of each factor alone, and their directions."""
    tables = codec_for(FibParameters.of(64, 2, 64, scale_search=True)).tables
    rows = gaussian(1, 32, 64)
    cosines = []
    for scale in tables.scales:
        one = replace(tables, scales=(scale,))
        cosines.append(torch.cosine_similarity(rows, kernels.decode(kernels.encode(rows, one), one), dim=-1))
    found = torch.cosine_similarity(rows, kernels.decode(kernels.encode(rows, tables), tables), dim=-1)
    torch.testing.assert_close(found, torch.stack(cosines).amax(0))
    assert tables.scales == pytest.approx((1 / 1.16, 1.16**-0.5, 1.0, 1.16**0.5, 1.16))


def test_a_decision_table_finds_nearest_or_nearly_nearest_codewords() -> None:
    words = codec_for(FibParameters.of(128, 2, 256)).tables.codewords
    table = decision_table(words)
    assert table.cells.shape == (table.side, table.side) == (256, 256)
    assert table.cells.unique().numel() == 256
    # A codeword is well inside its own cell of the plane.
    assert table.look_up(words).tolist() == list(range(256))
    points = gaussian(4096, 2) / 128**0.5
    distances = torch.cdist(points, words)
    chosen = distances.gather(1, table.look_up(points).long().unsqueeze(-1)).squeeze(-1)
    diagonal = 2 * table.extent / table.side * 2**0.5
    inside = points.abs().amax(-1) < table.extent
    assert (chosen <= distances.amin(1) + diagonal)[inside].all()
    # Beyond the square the cells of its border decide.
    assert table.look_up(torch.tensor([[9.0, -9.0]])) == table.cells[-1, 0]


BOUNDS = {(1, 4): 0.1162, (2, 16): 0.1068, (4, 256): 0.0962, (2, 64): 0.0296, (2, 256): 0.00772, (8, 256): 0.322}


@pytest.mark.parametrize(("block_dim", "size"), [*BOUNDS, (16, 256)])
def test_distortion_of_the_codec_on_unit_vectors(block_dim: int, size: int) -> None:
    """At d = 128 with a float16 norm and no gain; the gain lowers it."""
    bound = {**BOUNDS, (16, 256): 0.581}[block_dim, size]
    plain, gained = (
        unit_distortion(
            FibParameters.of(128, block_dim, size, norm_format="f16", gain_corrected=flag), vectors=8000, seed=99
        )
        for flag in (False, True)
    )
    assert 0.95 * bound <= plain <= bound
    assert gained < plain


@pytest.mark.parametrize("book", [(1, 16), (2, 256), (4, 256)])
def test_hadamard_is_as_good_as_haar_on_gaussian_vectors(book: tuple[int, int]) -> None:
    """T12: less than 1 % apart."""
    rows = gaussian(16, 512, 64)
    errors = []
    for kind in ("hadamard", "haar"):
        codec = codec_for(FibParameters.of(64, *book, rotation=kind))
        errors.append(relative_mse(rows, codec.decode(codec.encode(rows))))
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


@pytest.mark.parametrize("size", [5, 100, 300, 1000])
def test_odd_codebook_sizes(size: int, tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """N that is no power of two, and N beyond a byte."""
    monkeypatch.setenv("FIBKV_CACHE_DIR", str(tmp_path))
    codec = codec_for(FibParameters.of(32, 1, size))
    rows = gaussian(2, 16, 32)
    codes = codec.encode(rows)
    assert relative_mse(rows, codec.decode(codes)) < {5: 0.09, 100: 5e-4, 300: 2e-4, 1000: 1e-4}[size]
    data = bytearray(codec.to_bytes(codes))
    codec.from_bytes(memoryview(bytes(data)), 2, 16)
    if size != 1000:
        data[-1] |= 0xE0
    with pytest.raises(PageError, match=f"codes inside the codebook of {size} words"):
        codec.from_bytes(
            memoryview(bytes(data[: -codec.vector_nbytes + 1]) + b"\xff" * (codec.vector_nbytes - 1)), 2, 16
        )
