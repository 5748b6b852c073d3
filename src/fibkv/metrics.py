"""Metrics on outputs and logits: relative error, perplexity, KL divergence, top-1 agreement (float64 inside).

Logits are [tokens, vocab] of one sequence, in any floating dtype and on any device. Each function returns one
figure per token, [tokens], so that means and percentiles can be taken over several sequences at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fibkv.errors import ContractError

# Rows of logits that are turned into float64 at a time: with a vocabulary of 150,000, 256 rows are 0.3 GB.
_ROWS_AT_A_TIME = 256


def relative_error(output: Tensor, expected: Tensor) -> float:
    """|output - expected| / |expected| in the 2-norm over all elements.

    Args:
        output: any shape and floating dtype.
        expected: of that shape, not zero everywhere.

    Returns:
        The largest float64 for an output that is not finite.

    Raises:
        ContractError: shapes that differ.
    """
    if output.shape != expected.shape:
        raise ContractError("output", f"shape {list(expected.shape)}", list(output.shape))
    norm = torch.linalg.vector_norm
    error: Tensor = norm(output.double() - expected.double()) / norm(expected.double())
    return float(error.nan_to_num(nan=torch.finfo(torch.float64).max))


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target token, in nats.

    Args:
        logits: [tokens, vocab], where row t predicts ``targets[t]``.
        targets: token ids, int64 [tokens].

    Returns:
        float64 [tokens].

    Raises:
        ContractError: shapes that do not fit, nothing to measure, or logits that are not finite.
    """
    _check_logits("logits", logits)
    if targets.shape != logits.shape[:1]:
        raise ContractError("targets", f"shape [{logits.shape[0]}], one per row of the logits", list(targets.shape))
    rows = zip(torch.split(logits, _ROWS_AT_A_TIME), torch.split(targets, _ROWS_AT_A_TIME), strict=True)
    return torch.cat([torch.nn.functional.cross_entropy(row.double(), ids, reduction="none") for row, ids in rows])


def perplexity(nll: Tensor) -> float:
    """``exp`` of the mean negative log-likelihood [tokens] in nats."""
    return math.exp(nll.double().mean().item())


def kl_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(reference || logits) of each token's next-token distribution, in nats.

    Args:
        reference: logits of the undamaged model, [tokens, vocab].
        logits: logits of the model under test, same shape.

    Returns:
        float64 [tokens], never negative.

    Raises:
        ContractError: shapes that differ, nothing to measure, or logits that are not finite.
    """
    divergences = []
    for expected, actual in _row_pairs(reference, logits):
        log_p = expected.double().log_softmax(-1)
        log_q = actual.double().log_softmax(-1)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
    # The sum may come out as -1e-17 where both sides are equal but for rounding.
    return torch.cat(divergences).clamp_min(0.0)


def top1_agreement(reference: Tensor, logits: Tensor) -> Tensor:
    """Whether both sides put the same token first, bool [tokens]; of equal logits the lower token id is first.

    Args:
        reference: logits of the undamaged model, [tokens, vocab].
        logits: logits of the model under test, same shape.

    Raises:
        ContractError: shapes that differ, nothing to measure, or logits that are not finite.
    """
    pairs = _row_pairs(reference, logits)
    return torch.cat([expected.argmax(-1) == actual.argmax(-1) for expected, actual in pairs])


def _row_pairs(reference: Tensor, logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    _check_logits("reference", reference)
    _check_logits("logits", logits)
    if logits.shape != reference.shape:
        raise ContractError("logits", f"shape {list(reference.shape)}, that of the reference", list(logits.shape))
    return zip(torch.split(reference, _ROWS_AT_A_TIME), torch.split(logits, _ROWS_AT_A_TIME), strict=True)


def _check_logits(field: str, logits: Tensor) -> None:
    if logits.ndim != 2 or logits.numel() == 0:
        raise ContractError(field, "non-empty [tokens, vocab]", list(logits.shape))
    if not logits.isfinite().all():
        raise ContractError(field, "finite numbers", "inf or nan")
