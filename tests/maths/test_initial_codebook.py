"""T2 and the untrained column of T5: radii, directions and the codebook made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fibkv.directions import directions, fibonacci_sphere, golden_angle, roberts_kronecker, roberts_root
from fibkv.errors import ContractError
from fibkv.lloyd import assign
from fibkv.spherical import companded_beta, companded_radii, initial_codewords, planar_radii, sample_blocks

RADII = {  # (d, k): beta, then r_n for n = 1, 4, 8, 12, 16 of N = 16
    (64, 2): (16, 0.044523, 0.123735, 0.196879, 0.276081, 0.441310),
    (64, 3): (18.7, 0.081447, 0.167834, 0.237686, 0.309786, 0.456592),
    (64, 4): (20 + 1 / 3, 0.114237, 0.202957, 0.270350, 0.338233, 0.474399),
    (64, 8): (22.6, 0.217857, 0.307368, 0.369194, 0.428830, 0.544385),
    (128, 2): (32, 0.031491, 0.087662, 0.139901, 0.197143, 0.320383),
    (128, 3): (37.9, 0.057448, 0.118704, 0.168726, 0.221066, 0.331075),
    (128, 4): (41 + 2 / 3, 0.080421, 0.143396, 0.191814, 0.241323, 0.343935),
    (128, 8): (48.2, 0.152576, 0.216627, 0.261719, 0.306096, 0.395455),
}
ROOTS = (
    (1, 1.618033988750),
    (2, 1.324717957245),
    (3, 1.220744084606),
    (4, 1.167303978261),
    (5, 1.134724138402),
    (6, 1.112775684279),
    (7, 1.096981557799),
    (8, 1.085070245491),
)
INITIAL = [  # k, N, D at d = 64 and 128
    (2, 4, 0.5091, 0.5140),
    (2, 16, 0.1228, 0.1244),
    (2, 64, 0.0310, 0.0315),
    (2, 256, 0.00777, 0.00790),
    (4, 16, 0.4531, 0.4558),
    (4, 256, 0.1112, 0.1123),
    (8, 16, 0.785, 0.786),
    (8, 256, 0.3761, 0.3781),
]


def _initial_distortion(dim: int, block_dim: int, size: int) -> float:
    def scaled(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values * dim**0.5).float()

    blocks = sample_blocks(dim, block_dim, 200_000, np.random.default_rng(7))
    return assign(scaled(blocks), scaled(initial_codewords(dim, block_dim, size))).distortion


@pytest.mark.parametrize(("dim", "block_dim"), RADII)
def test_radii(dim: int, block_dim: int) -> None:
    beta, *expected = RADII[dim, block_dim]
    assert companded_beta(dim, block_dim) == pytest.approx(beta, rel=1e-12)
    radii = companded_radii(dim, block_dim, 16)
    assert radii[[0, 3, 7, 11, 15]] == pytest.approx(expected, abs=1e-6)
    assert (np.diff(radii) > 0).all()


@pytest.mark.parametrize("dim", [4, 64, 128, 256])
@pytest.mark.parametrize("size", [2, 16, 1024])
def test_closed_form_of_planar_radii(dim: int, size: int) -> None:
    assert planar_radii(dim, size) == pytest.approx(companded_radii(dim, 2, size), abs=1e-12)


@pytest.mark.parametrize(("block_dim", "root"), ROOTS)
def test_roberts_roots(block_dim: int, root: float) -> None:
    computed = roberts_root(block_dim)
    assert computed == pytest.approx(root, abs=1e-12)
    assert computed ** (block_dim + 1) == pytest.approx(computed + 1, abs=1e-12)


@pytest.mark.parametrize("block_dim", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("size", [2, 7, 64, 256])
def test_directions_are_unit_vectors_without_a_side(block_dim: int, size: int) -> None:
    points = directions(block_dim, size)
    assert points.shape == (size, block_dim)
    assert np.linalg.norm(points, axis=1) == pytest.approx(np.ones(size), abs=1e-12)
    assert len(np.unique(points.round(12), axis=0)) == size
    # Independent random points would have a mean of about 1 over the root of their number.
    if size >= 64:
        assert np.linalg.norm(points.mean(0)) < 1.5 * size**-0.5


def test_golden_angle_between_neighbours() -> None:
    points = golden_angle(10)
    turn = np.degrees(np.arccos((points[:-1] * points[1:]).sum(1)))
    assert turn == pytest.approx(np.full(9, 137.50776405), abs=1e-6)


@pytest.mark.parametrize("size", [8, 64, 100, 512])
def test_fibonacci_heights_are_all_there_and_do_not_follow_the_radii(size: int) -> None:
    heights = fibonacci_sphere(size)[:, 2]
    assert np.sort(heights) == pytest.approx(1 - (2 * np.arange(size, 0, -1) - 1) / size, abs=1e-12)
    # Unpermuted, this correlation is -1: small radii at one pole, large ones at the other.
    assert abs(np.corrcoef(heights, np.arange(size))[0, 1]) < 0.45


def test_first_roberts_point() -> None:
    # n = 0: xi_j = frac(phi^-j / 2), mapped by the inverse normal CDF.
    phi = roberts_root(4)
    gaussians = torch.special.ndtri(torch.tensor([phi**-j / 2 for j in (1, 2, 3, 4)], dtype=torch.float64)).numpy()
    assert roberts_kronecker(4, 3)[0] == pytest.approx(gaussians / np.linalg.norm(gaussians), abs=1e-9)


def test_a_scalar_code_has_no_directions() -> None:
    with pytest.raises(ContractError, match=r"directions\.block_dim: expected at least 2, got 1"):
        directions(1, 4)


@pytest.mark.parametrize(("block_dim", "size", "at_64", "at_128"), INITIAL)
def test_initial_distortion(block_dim: int, size: int, at_64: float, at_128: float) -> None:
    assert _initial_distortion(64, block_dim, size) == pytest.approx(at_64, rel=0.01)
    assert _initial_distortion(128, block_dim, size) == pytest.approx(at_128, rel=0.01)


def test_permuted_fibonacci_sphere_beats_the_plane() -> None:
    # With heights in natural order this is .251, twice the .125 of k = 2.
    assert _initial_distortion(128, 3, 64) < _initial_distortion(128, 2, 16)
