"""What coding does to the attention of one layer: the metrics of a quality budget, per KV head, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fibkv.contract import Contract
from fibkv.errors import ContractError

# Below this share of the attention both sides count as equal in the divergence.
PROBABILITY_FLOOR = 1e-12


class AttentionErrors(Contract):
    """Errors of attention on decoded keys and values, means over queries.

    Attributes:
        logit_mse: mean squared error of the logits q.k/sqrt(d).
        attention_tv: half the L1 distance of the two softmax rows.
        attention_kl: KL(exact || decoded) of the softmax rows in nats, both floored at 1e-12.
        topk_agreement: share of the k largest logits that are the same tokens.
        value_aggregation_mse: mean squared error of the output under the exact weights.
    """

    logit_mse: float
    attention_tv: float
    attention_kl: float
    topk_agreement: float
    value_aggregation_mse: float

    def by_bound(self) -> dict[str, float]:
        """What each bound of a `fibkv.QualityBudget` is compared with."""
        return {
            "max_logit_mse": self.logit_mse,
            "max_attention_tv": self.attention_tv,
            "max_topk_disagreement": 1 - self.topk_agreement,
            "max_value_aggregation_mse": self.value_aggregation_mse,
        }


def attention_errors(
    query: Tensor,
    exact: tuple[Tensor, Tensor],
    decoded: tuple[Tensor, Tensor],
    *,
    scale: float | None = None,
    positions: Tensor | None = None,
    k: int = 8,
) -> tuple[AttentionErrors, ...]:
    """The errors of each KV head.

    Args:
        query: ``[Hq, Q, d]``; Hq is a multiple of H.
        exact: keys ``[H, T, d]`` and values ``[H, T, d_value]`` as they came.
        decoded: the same, through a codec.
        scale: of the logits; default 1/sqrt(d).
        positions: int64 ``[Q]``: query i sees tokens 0 to positions[i]. Default: every query sees all tokens.
        k: of the top-k agreement, clipped to the tokens that a query sees; of equal logits the earlier token is first.

    Raises:
        ContractError: shapes that do not fit, nothing to measure, or numbers that are not finite.
    """
    keys, values = exact
    for name, one, other in (("keys", keys, decoded[0]), ("values", values, decoded[1])):
        if one.shape != other.shape or one.numel() == 0:
            raise ContractError(f"attention_errors.{name}", f"non-empty, of shape {list(one.shape)}", list(other.shape))
    heads, tokens, dim = keys.shape
    if query.shape[0] % heads or query.shape[-1] != dim or query.numel() == 0:
        raise ContractError("attention_errors.query", f"[a multiple of {heads}, Q, {dim}]", list(query.shape))
    if not all(bool(torch.isfinite(tensor).all()) for tensor in (query, *exact, *decoded)):
        raise ContractError("attention_errors", "finite numbers", "inf or nan")
    grouped = query.double().unflatten(0, (heads, -1)) * (dim**-0.5 if scale is None else scale)
    seen = torch.ones(query.shape[1], tokens, dtype=torch.bool, device=query.device)
    if positions is not None:
        seen = torch.arange(tokens, device=query.device) <= positions[:, None].to(query.device)
    found = []
    for head in range(heads):
        logits, other = (torch.einsum("gqd,td->gqt", grouped[head], side[head].double()) for side in (keys, decoded[0]))
        found.append(_head_errors(logits, other, (values[head].double(), decoded[1][head].double()), seen, k))
    return tuple(found)


def _head_errors(logits: Tensor, other: Tensor, values: tuple[Tensor, Tensor], seen: Tensor, k: int) -> AttentionErrors:
    """Of one KV head: logits ``[G, Q, T]`` of its queries on both sides, values ``[T, d_value]`` on both sides."""
    squared = (logits - other).square().masked_fill(~seen, 0.0)
    p, q = (side.masked_fill(~seen, -torch.inf).softmax(-1) for side in (logits, other))
    log_p, log_q = (side.clamp_min(PROBABILITY_FLOOR).log() for side in (p, q))
    return AttentionErrors(
        logit_mse=(squared.sum() / (seen.sum() * logits.shape[0])).item(),
        attention_tv=((p - q).abs().sum(-1) / 2).mean().item(),
        attention_kl=(p * (log_p - log_q)).sum(-1).mean().clamp_min(0).item(),
        topk_agreement=_topk_agreement(logits, other, seen, k),
        value_aggregation_mse=(p @ (values[0] - values[1])).square().mean().item(),
    )


def _topk_agreement(logits: Tensor, other: Tensor, seen: Tensor, k: int) -> float:
    wanted = seen.sum(-1).clamp(max=k)  # [Q]
    ranks = []
    for side in (logits, other):
        order = side.masked_fill(~seen, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        ranks.append(order.argsort(-1))
    both = (ranks[0] < wanted[:, None]) & (ranks[1] < wanted[:, None])
    return float((both.sum(-1) / wanted).mean())


def mean_errors(errors: list[AttentionErrors]) -> AttentionErrors:
    """The mean of each metric, over heads or windows.

    Raises:
        ContractError: there are none.
    """
    if not errors:
        raise ContractError("mean_errors", "at least one measurement", errors)
    names = AttentionErrors.model_fields
    return AttentionErrors(**{name: sum(getattr(one, name) for one in errors) / len(errors) for name in names})
