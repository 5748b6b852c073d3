"""Transforms and bit allocation from second moments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fibkv.allocation import PAIR_LEVELS
from fibkv.calibration import (
    PAIR_DISTORTIONS,
    LayerStatistics,
    allocate,
    balanced_transform,
    evened,
    klt,
    klt_parameters,
)
from fibkv.codecs.fib import unit_distortion
from fibkv.errors import ContractError
from fibkv.parameters import FibParameters

HEADS, DIM = 2, 8


def moments(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Covariances ``[H, d, d]`` of keys and of queries with axes and eigenvalues of their own."""
    generator = torch.Generator().manual_seed(seed)
    roots = torch.randn(2, HEADS, DIM, DIM, generator=generator, dtype=torch.float64)
    keys, queries = roots @ roots.mT + 0.1 * torch.eye(DIM, dtype=torch.float64)
    return keys, queries


def test_balanced_transform_gives_keys_and_queries_one_moment() -> None:
    keys, queries = moments()
    transform = balanced_transform(keys, queries)
    inverse = torch.linalg.inv(transform)
    assert torch.allclose(transform, transform.mT)
    # The ridge keeps them from being exactly equal.
    assert torch.allclose(transform @ keys @ transform.mT, inverse.mT @ queries @ inverse, rtol=0.02, atol=0.05)


def test_balanced_transform_of_equal_moments_is_the_identity() -> None:
    keys, _ = moments()
    assert torch.allclose(balanced_transform(keys, keys), torch.eye(DIM, dtype=torch.float64).expand(HEADS, -1, -1))


def test_klt_decorrelates_keys_and_whitens_queries() -> None:
    keys, queries = moments()
    found = klt(keys, queries)
    coded = found.transform @ keys @ found.transform.mT
    assert torch.allclose(coded, torch.diag_embed(found.variances), atol=0.01 * float(coded.max()))
    assert bool((found.variances.diff(dim=-1) <= 0).all())
    inverse = torch.linalg.inv(found.transform)
    white = inverse.mT @ evened(queries) @ inverse
    assert torch.allclose(white, torch.eye(DIM, dtype=torch.float64).expand(HEADS, -1, -1), atol=0.1)


def test_transforms_of_a_singular_moment_are_invertible() -> None:
    keys, _ = moments()
    nothing = torch.zeros_like(keys)
    for transform in (balanced_transform(keys, nothing), klt(nothing, keys).transform, klt(keys, nothing).transform):
        assert torch.isfinite(torch.linalg.inv(transform)).all()


def error_of(variances: Tensor, pairs: Tensor) -> float:
    table = torch.tensor(PAIR_DISTORTIONS, dtype=torch.float64)
    return float((variances * table[pairs // 2]).sum())


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.floats(0, 1e6), min_size=2, max_size=2),
    st.sampled_from(range(0, 17, 2)),
)
def test_allocation_is_the_best_of_all(spreads: list[float], bits: int) -> None:
    variances = torch.tensor(spreads, dtype=torch.float64)
    pairs = allocate(variances, bits)
    assert int(pairs.sum()) == bits
    others = [torch.tensor([n, bits - n]) for n in PAIR_LEVELS if bits - n in PAIR_LEVELS]
    best = min(error_of(variances, other) for other in others)
    assert error_of(variances, pairs) <= best * (1 + 1e-9)


def test_allocation_follows_the_variance_of_each_head() -> None:
    variances = torch.tensor([[20.0, 1.0], [1.0, 1.0]])
    assert allocate(variances, 8).tolist() == [[6, 2], [4, 4]]


@pytest.mark.parametrize("bits", [3, 18, -2])
def test_allocation_refuses_bits_that_cannot_be_given_out(bits: int) -> None:
    with pytest.raises(ContractError, match=r"allocate\.bits: expected an even number up to 16"):
        allocate(torch.ones(2), bits)


def test_levels_cost_what_their_codebooks_err() -> None:
    for bits, expected in zip(PAIR_LEVELS[2:], PAIR_DISTORTIONS[2:], strict=True):
        book = FibParameters.of(128, 2, 1 << bits, norm_format="f16", gain_corrected=False)
        assert unit_distortion(book, vectors=4000) == pytest.approx(expected, rel=0.02)


def test_klt_codes_spend_the_same_bits_in_every_head_and_follow_its_variances() -> None:
    keys, queries = moments()
    found = klt(keys, queries)
    parameters = klt_parameters(found, 2.5)
    assert parameters.vector_bits == 20
    assert parameters.head_dim == DIM
    for head, variances in zip(parameters.heads, found.pair_variances, strict=True):
        assert list(head.bits) == allocate(variances, 20).tolist()
        expected = 2 * (variances[0] / variances).log2()
        assert head.half_octaves == tuple(round(float(fall)) for fall in expected)
    assert klt_parameters(klt(keys, queries), 2.5) == parameters
    odd = klt_parameters(found, 2.3)
    assert odd.vector_bits == 18, "rounded down to whole steps"
    with pytest.raises(ContractError, match="up to 32"):
        klt_parameters(found, 4.5)


def test_the_space_of_klt_codes_has_pairs_of_variance_one() -> None:
    keys, queries = moments()
    white = klt(keys, queries).whitened
    diagonal = (white @ keys @ white.mT).diagonal(dim1=-2, dim2=-1).unflatten(-1, (-1, 2)).mean(-1)
    assert torch.allclose(diagonal, torch.ones(HEADS, DIM // 2, dtype=torch.float64), atol=0.02)


def test_axes_have_signs_of_their_own() -> None:
    """Whatever sign an eigenvector comes with, the space is the same."""
    keys, queries = moments()
    flipped = torch.diag(torch.tensor([-1.0, 1, -1, 1, 1, -1, 1, 1], dtype=torch.float64))
    one = klt(keys, torch.eye(DIM, dtype=torch.float64).expand(HEADS, -1, -1)).transform
    largest = one.gather(-1, one.abs().argmax(-1, keepdim=True))
    assert (largest > 0).all()
    other = klt(flipped @ keys @ flipped, torch.eye(DIM, dtype=torch.float64).expand(HEADS, -1, -1)).transform
    assert torch.allclose(other.abs(), one.abs(), atol=1e-9)
    assert klt(keys, queries).transform.equal(klt(keys.clone(), queries.clone()).transform)


def statistics(**changes: object) -> LayerStatistics:
    keys, queries = moments()
    mean = torch.zeros(HEADS, DIM, dtype=torch.float64)
    given: dict[str, object] = {
        "tokens": 10,
        "key_mean": mean,
        "key_moment": keys,
        "query_moment": queries,
        "value_mean": mean,
        "value_moment": keys,
    }
    return LayerStatistics(**{**given, **changes})  # type: ignore[arg-type]


def test_key_covariance_is_the_moment_about_the_mean() -> None:
    mean = torch.ones(HEADS, DIM, dtype=torch.float64)
    keys, _ = moments()
    moment = keys + mean.unsqueeze(-1) * mean.unsqueeze(-2)
    assert torch.allclose(statistics(key_mean=mean, key_moment=moment).key_covariance, keys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "tokens: expected at least 1"),
        ({"query_moment": torch.ones(HEADS, DIM)}, r"query_moment: expected shape \[2, 8, 8\]"),
        ({"value_moment": torch.full((HEADS, DIM, DIM), torch.inf).double()}, "value_moment: expected finite"),
        ({"key_mean": torch.zeros(HEADS, DIM)}, "key_moment: expected float64, as everywhere.*mean of torch.float32"),
    ],
)
def test_statistics_are_checked(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        statistics(**changes)
