"""Rotations: orthogonal, the same on every machine, and T13: no input is worse than a Gaussian one."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor

from fibkv import codebook
from fibkv.errors import ContractError
from fibkv.parameters import Rotation as Kind
from fibkv.rotation import HADAMARD_ROUNDS, hadamard_signs, rotation
from tests.maths.measure import distortion, quantize

GOLDEN: list[tuple[Kind, int, int, str]] = [
    ("hadamard", 64, 0, "blake3:a11d8a7dc916c086caed4f2bd0320afd68b7798c9cee5361c4aca40891900121"),
    ("hadamard", 128, 0, "blake3:0539a8a8b053eaceae62a166c031d2feba5b72e5a3f77c75fd4e5f58c3e0d102"),
    ("hadamard", 256, 2**64 - 1, "blake3:28b145694aa88313c59ac7dcb7b9ff06bb0e25e6964769ee2cb6c3ddc7eab6fd"),
    ("haar", 64, 0, "blake3:d5bdfae6d28435c834907dbb687f0c6efe254decf60d71e7b203a856fc3815c4"),
    ("haar", 80, 0, "blake3:b124d897ff8db34920a5d1678753078e9ee54e3211596d56a3e671152d1c4ec1"),
    ("haar", 96, 1, "blake3:3ce6cb98a251823d8d192d76312d152b062a2b3852b442e3dc1d67f950de8d6f"),
    ("haar", 112, 2, "blake3:a7da01aadff8c2af64dfcf1eddc864936f4a6c04f51104f57b197cc8ac473397"),
    ("haar", 128, 0, "blake3:d43fcde234fe0b14915f5b5da2869a3af9e58ad18d0243ef9ae5c2e86eaf3845"),
    ("haar", 192, 2**64 - 1, "blake3:fab11192542c10aee23bb96a2de3f394b39cae022c9d90976c02cf2b4bc7e929"),
]
BOOKS = ((1, 2), (1, 4), (1, 16), (2, 16), (2, 64), (2, 256))


def _inputs(dim: int) -> dict[str, Tensor]:
    one_hot = torch.zeros(dim, dtype=torch.float64)
    one_hot[7] = 1
    huge = torch.randn(dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    huge[5] *= 100
    pair = torch.zeros(dim, dtype=torch.float64)
    pair[[3, dim // 2 + 8]] = 1
    inputs = {"one-hot": one_hot, "huge channel": huge, "constant": torch.ones(dim, dtype=torch.float64), "pair": pair}
    return {name: vector / vector.norm() for name, vector in inputs.items()}


def _sylvester(dim: int) -> Tensor:
    """The unnormalized Hadamard matrix ``[dim, dim]`` in natural order."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < dim:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


def _rotated(kind: Kind, dim: int, seeds: int) -> dict[str, Tensor]:
    """Each input ``[seeds, dim]`` turned by that many rotations."""
    inputs = _inputs(dim)
    # Not through the process-wide cache: it keeps few, and these are used once.
    make = rotation.__wrapped__
    turned = torch.stack([make(kind, dim, seed).apply(torch.stack([*inputs.values()])) for seed in range(seeds)], dim=1)
    return dict(zip(inputs, turned.double(), strict=True))


@pytest.mark.parametrize(("kind", "dim", "seed", "digest"), GOLDEN)
def test_digests_never_change(kind: Kind, dim: int, seed: int, digest: str) -> None:
    """On any machine: pages are bound to these digests."""
    assert rotation(kind, dim, seed).digest == digest


@pytest.mark.parametrize(("kind", "dim"), [("hadamard", 2), ("hadamard", 64), ("hadamard", 256), ("hadamard", 1024)])
def test_hadamard_is_orthogonal(kind: Kind, dim: int) -> None:
    matrix = rotation(kind, dim, 3).matrix.double()
    deviation = (matrix @ matrix.T - torch.eye(dim)).abs().max()
    assert deviation == 0 if dim <= 256 else deviation < 1e-7


@pytest.mark.parametrize("dim", [2, 3, 64, 80, 96, 112, 128, 192])
def test_haar_is_orthogonal(dim: int) -> None:
    made = rotation("haar", dim, 3)
    matrix = made.matrix.double()
    assert made.matrix.dtype == torch.float32
    assert (matrix @ matrix.T - torch.eye(dim)).abs().max() < 1e-7


@pytest.mark.parametrize("kind", ["hadamard", "haar"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_apply_and_invert(kind: Kind, dtype: torch.dtype) -> None:
    made = rotation(kind, 64, 1)
    vectors = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    turned = made.apply(vectors)
    assert turned.dtype == torch.float32
    assert torch.allclose(turned[1, 2], made.matrix @ vectors[1, 2].float(), atol=1e-5)
    assert torch.allclose(turned.norm(dim=-1), vectors.float().norm(dim=-1), rtol=1e-5)
    assert torch.allclose(made.invert(turned), vectors.float(), atol=1e-5)


def test_signs_and_transforms_make_the_matrix() -> None:
    dim, seed = 32, 9
    signs = hadamard_signs(dim, seed)
    assert signs.dtype == torch.int8
    assert signs.shape == (HADAMARD_ROUNDS, dim)
    product = torch.eye(dim, dtype=torch.float64)
    for row in signs:
        product = _sylvester(dim) @ (row.double()[:, None] * product) / dim**0.5
    assert torch.allclose(product, rotation("hadamard", dim, seed).matrix.double(), atol=1e-12)


def test_signs_are_fair() -> None:
    signs = torch.stack([hadamard_signs(64, seed) for seed in range(200)]).double()
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    # 76,800 signs: five standard deviations of their mean, and of the mean of a single place.
    assert abs(float(signs.mean())) < 0.018
    assert float(signs.mean(0).abs().max()) < 0.36


def test_haar_entries_follow_the_spherical_law_and_determinants_both_signs() -> None:
    dim, seeds = 8, 400
    matrices = torch.stack([rotation.__wrapped__("haar", dim, seed).matrix.double() for seed in range(seeds)])
    law = stats.beta(1 / 2, (dim - 1) / 2)
    for row, column in ((0, 0), (7, 7), (0, 7)):
        assert stats.kstest(matrices[:, row, column].square().numpy(), law.cdf).pvalue > 1e-3
        # Without a fixed sign of R's diagonal the diagonal of Q would lean to one side.
        assert abs(float(matrices[:, row, column].sign().mean())) < 5 / seeds**0.5
    assert abs(float(torch.linalg.det(matrices).mean())) < 5 / seeds**0.5


def test_cached_by_kind_dim_and_seed() -> None:
    assert rotation("haar", 16, 4) is rotation("haar", 16, 4)
    digests = {rotation(kind, 16, seed).digest for kind in ("haar", "hadamard") for seed in (0, 1, 2**64 - 1)}
    assert len(digests) == 6


def test_refusals() -> None:
    with pytest.raises(ContractError, match=r"rotation\.dim: expected a power of two for a hadamard rotation, got 80"):
        rotation("hadamard", 80, 0)
    with pytest.raises(ContractError, match=r"rotation\.dim: expected at least 2, got 1"):
        rotation("haar", 1, 0)
    with pytest.raises(ContractError, match=r"rotation\.seed: expected an unsigned 64-bit number, got -1"):
        rotation("haar", 4, -1)
    with pytest.raises(ContractError, match=r"rotation\.kind: expected hadamard or haar, got 'householder'"):
        rotation("householder", 4, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["hadamard", "haar"])
@pytest.mark.parametrize("dim", [64, 128])
def test_no_input_is_worse_than_a_gaussian_one(kind: Kind, dim: int) -> None:
    """T13. Averaged over seeds each fixed input has the codebook's distortion."""
    seeds = 500 if kind == "hadamard" else 250
    for name, rotated in _rotated(kind, dim, seeds).items():
        for block_dim, size in BOOKS:
            book = codebook.load(block_dim, size)
            ratio = distortion(rotated, quantize(rotated, book.codewords)) / book.report.held_out_at(dim)
            # 16,000 or more coordinates: the distortion scatters by about 1.2 %.
            assert ratio == pytest.approx(1, abs=0.04), f"{name}, k={block_dim}, N={size}"


@pytest.mark.parametrize(("size", "expected"), [(2, 0.040), (4, 0.255)])
def test_one_round_fails_on_a_one_hot_vector(size: int, expected: float) -> None:
    # All coordinates are +-1/sqrt(d): a point mass, not a Gaussian. Here D should be .361 and .116.
    signs = torch.stack([hadamard_signs(128, seed)[0] for seed in range(100)]).double()
    rotated = (_inputs(128)["one-hot"] * signs) @ _sylvester(128) / 128**0.5
    assert distortion(rotated, quantize(rotated, codebook.load(1, size).codewords)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("rounds", "name", "excess"), [(2, "one-hot", 1.3), (3, "pair", 1.05)])
def test_few_rounds_leave_a_grid(rounds: int, name: str, excess: float) -> None:
    """Why there are more than three: at d = 64 the grid of the coordinates shows at 4 bits."""
    dim, seeds = 64, 500
    rotated = _inputs(dim)[name].repeat(seeds, 1)
    for index in range(rounds):
        signs = torch.stack([hadamard_signs(dim, seed)[index] for seed in range(seeds)]).double()
        rotated = (rotated * signs) @ _sylvester(dim) / dim**0.5
    book = codebook.load(1, 16)
    assert distortion(rotated, quantize(rotated, book.codewords)) > excess * book.report.held_out_at(dim)
