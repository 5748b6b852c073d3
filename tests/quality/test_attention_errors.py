"""The metrics of a quality budget, against what they mean written out for one query."""

from __future__ import annotations

import pytest
import torch

from fibkv.attention_errors import attention_errors, mean_errors
from fibkv.errors import ContractError


def _tensors(tokens: int = 12) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 3, 8), (2, tokens, 8), (2, tokens, 6), (2, tokens, 8), (2, tokens, 6))
    query, keys, values, key_noise, value_noise = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, keys, values, keys + 0.2 * key_noise, values + 0.2 * value_noise


def test_errors_are_what_they_say() -> None:
    query, keys, values, other_keys, other_values = _tensors()
    positions = torch.tensor([0, 5, 11])
    found = attention_errors(query, (keys, values), (other_keys, other_values), positions=positions, k=3)
    head, mse, tv, kl, topk, value = 1, [], [], [], [], []
    for one in (2, 3):  # the query heads of KV head 1
        for index, position in enumerate(positions.tolist()):
            exact, coded = (side[head, : position + 1].double() @ query[one, index].double() / 8**0.5
                            for side in (keys, other_keys))  # fmt: skip
            p, q = exact.softmax(0), coded.softmax(0)
            mse += (exact - coded).square().tolist()
            tv.append((p - q).abs().sum().item() / 2)
            kl.append((p * (p.clamp_min(1e-12).log() - q.clamp_min(1e-12).log())).sum().item())
            k = min(3, position + 1)
            topk.append(len(set(exact.topk(k).indices.tolist()) & set(coded.topk(k).indices.tolist())) / k)
            error = p @ (values[head, : position + 1] - other_values[head, : position + 1]).double()
            value.append(error.square().mean().item())
    assert found[head].logit_mse == pytest.approx(sum(mse) / len(mse))
    assert found[head].attention_tv == pytest.approx(sum(tv) / 6)
    assert found[head].attention_kl == pytest.approx(sum(kl) / 6)
    assert found[head].topk_agreement == pytest.approx(sum(topk) / 6)
    assert found[head].value_aggregation_mse == pytest.approx(sum(value) / 6)


def test_exact_sides_have_no_error_and_ties_go_to_the_earlier_token() -> None:
    query, keys, values, *_ = _tensors()
    for one in attention_errors(query, (keys, values), (keys, values)):
        assert (one.logit_mse, one.attention_tv, one.attention_kl, one.topk_agreement) == (0, 0, 0, 1)
    flat = torch.ones_like(keys)
    assert attention_errors(query, (flat, values), (flat, values), k=100)[0].topk_agreement == 1
    mean = mean_errors(list(attention_errors(query, (keys, values), (keys, 2 * values))))
    assert mean.value_aggregation_mse > 0 == mean.logit_mse


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"query": torch.zeros(3, 1, 8)}, "attention_errors.query"),
        ({"keys": torch.zeros(2, 11, 8)}, "attention_errors.keys"),
        ({"keys": torch.full((2, 12, 8), torch.nan)}, "finite numbers"),
    ],
)
def test_refusals(change: dict[str, torch.Tensor], match: str) -> None:
    query, keys, values, *_ = _tensors()
    with pytest.raises(ContractError, match=match):
        attention_errors(change.get("query", query), (keys, values), (change.get("keys", keys), values))
    with pytest.raises(ContractError, match="at least one"):
        mean_errors([])
