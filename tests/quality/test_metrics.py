from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fibkv.errors import ContractError
from fibkv.metrics import kl_divergence, perplexity, token_nll, top1_agreement

# Softmax of the logs of a distribution is that distribution.
P = torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]).log()
Q = torch.tensor([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]]).log()


def test_nll_by_hand() -> None:
    nll = token_nll(P, torch.tensor([0, 2]))
    assert nll.dtype == torch.float64
    assert nll.tolist() == pytest.approx([math.log(2), math.log(10)], rel=1e-6)
    assert perplexity(nll) == pytest.approx(math.sqrt(20), rel=1e-6)


def test_kl_by_hand() -> None:
    kl = kl_divergence(P, Q)
    assert kl.dtype == torch.float64
    # 0.5 ln(0.5 / 0.25) + 0.25 ln(0.25 / 0.5) + 0
    assert kl.tolist() == pytest.approx([0.25 * math.log(2), 0.0], abs=1e-7)


def test_kl_is_taken_from_the_reference() -> None:
    skewed = torch.tensor([[0.9, 0.05, 0.05]]).log()
    flat = torch.zeros(1, 3)
    expected = 0.9 * math.log(0.9 * 3) + 0.1 * math.log(0.05 * 3)
    assert kl_divergence(skewed, flat).item() == pytest.approx(expected, rel=1e-6)
    assert kl_divergence(flat, skewed).item() != pytest.approx(expected, rel=1e-2)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([torch.float32, torch.bfloat16]))
def test_kl_of_equals_is_zero_and_of_others_is_not_negative(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 11, generator=generator).mul(10).to(dtype)
    other = torch.randn(5, 11, generator=generator).mul(10).to(dtype)
    assert torch.equal(kl_divergence(logits, logits), torch.zeros(5, dtype=torch.float64))
    assert (kl_divergence(logits, other) >= 0).all()
    # A shift of all logits of a token changes no distribution.
    assert kl_divergence(logits.double(), logits.double() + 3).max() < 1e-12


def test_top1_agreement_and_its_rule_for_ties() -> None:
    reference = torch.tensor([[1.0, 2.0, 0.0], [1.0, 0.0, 0.0], [3.0, 3.0, 0.0]])
    logits = torch.tensor([[0.0, 9.0, 8.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    assert top1_agreement(reference, logits).tolist() == [True, False, True]


def test_more_rows_than_are_taken_at_a_time() -> None:
    logits = torch.randn(600, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(600) % 7
    expected = -logits.double().log_softmax(-1)[torch.arange(600), targets]
    assert torch.allclose(token_nll(logits, targets), expected)
    assert kl_divergence(logits, -logits).shape == top1_agreement(logits, -logits).shape == (600,)


@pytest.mark.parametrize("metric", [kl_divergence, top1_agreement])
def test_refuses_shapes_that_differ(metric) -> None:
    with pytest.raises(ContractError, match=r"logits: expected shape \[2, 3\], that of the reference, got \[2, 2\]"):
        metric(P, Q[:, :2])


@pytest.mark.parametrize("metric", [kl_divergence, top1_agreement])
def test_refuses_nothing_to_measure(metric) -> None:
    with pytest.raises(ContractError, match=r"reference: expected non-empty \[tokens, vocab\], got \[0, 3\]"):
        metric(P[:0], Q[:0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_refuses_numbers_that_are_not_finite(bad: float) -> None:
    damaged = Q.clone()
    damaged[1, 1] = bad
    with pytest.raises(ContractError, match="logits: expected finite numbers, got 'inf or nan'"):
        kl_divergence(P, damaged)
    with pytest.raises(ContractError, match="logits: expected finite numbers"):
        token_nll(damaged, torch.tensor([0, 1]))


def test_refuses_another_number_of_targets() -> None:
    with pytest.raises(ContractError, match=r"targets: expected shape \[2\], one per row of the logits, got \[3\]"):
        token_nll(P, torch.tensor([0, 1, 2]))
