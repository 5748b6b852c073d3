"""Transforms and bit allocation from second moments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fibkv.calibration import PAIR_DISTORTIONS, LayerStatistics, allocate, balanced_transform, klt
from fibkv.errors import ContractError

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
    white = inverse.mT @ queries @ inverse
    assert torch.allclose(white, torch.eye(DIM, dtype=torch.float64).expand(HEADS, -1, -1), atol=0.1)


def test_transforms_of_a_singular_moment_are_invertible() -> None:
    keys, _ = moments()
    nothing = torch.zeros_like(keys)
    for transform in (balanced_transform(keys, nothing), klt(nothing, keys).transform, klt(keys, nothing).transform):
        assert torch.isfinite(torch.linalg.inv(transform)).all()


def error_of(variances: Tensor, pairs: Tensor) -> float:
    table = torch.tensor(PAIR_DISTORTIONS, dtype=torch.float64)
    return float((variances.unflatten(-1, (-1, 2)).sum(-1) * table[pairs]).sum())


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.floats(0, 1e6), min_size=4, max_size=4),
    st.sampled_from([0.0, 0.25, 1.0, 1.75, 2.0, 3.5, 4.0]),
)
def test_allocation_is_the_best_of_all(spreads: list[float], bits: float) -> None:
    variances = torch.tensor(spreads, dtype=torch.float64)
    pairs = allocate(variances, bits)
    total = int(bits * 4)
    assert int(pairs.sum()) == total
    others = [torch.tensor([n, total - n]) for n in range(9) if 0 <= total - n <= 8]
    best = min(error_of(variances, other) for other in others)
    assert error_of(variances, pairs) <= best * (1 + 1e-9)


def test_allocation_follows_the_variance_of_each_head() -> None:
    variances = torch.tensor([[20.0, 20.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert allocate(variances, 2).tolist() == [[6, 2], [4, 4]]


@pytest.mark.parametrize(("dim", "bits"), [(3, 2.0), (4, 4.25), (4, -1.0), (4, 0.3)])
def test_allocation_refuses_bits_that_cannot_be_given_out(dim: int, bits: float) -> None:
    with pytest.raises(ContractError, match=r"allocate\.bits.*whole number"):
        allocate(torch.ones(dim), bits)


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
        ({"value_moment": torch.full((HEADS, DIM, DIM), torch.inf)}, "value_moment: expected finite"),
    ],
)
def test_statistics_are_checked(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        statistics(**changes)
