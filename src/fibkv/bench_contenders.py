"""Attention in the ways that are compared: torch on dense bfloat16, fibkv on pages.

Queries are ``[B, Hq, Q, d]``, keys and values ``[B, H, T, d]``, outputs ``[B, Hq, Q, d]``.
Each query sees all T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fibkv.attend import Scores, attend
from fibkv.bench_forms import DenseForm, Form, Held, PagedForm
from fibkv.view import View

DenseAttention = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""``(query, keys, values, scale) -> out``."""


@dataclass(frozen=True, slots=True, eq=False)
class Contender(Generic[Held]):
    """One way to attend to one form.

    Attributes:
        name: what a reader of the table sees.
        kind: a torch baseline, or attention on compressed pages.
        form: what is attended to.
        attend: ``(query, one copy of the form) -> out``.
    """

    name: str
    kind: Literal["baseline", "fibkv"]
    form: Form[Held]
    attend: Callable[[Tensor, Held], Tensor]


def matmul(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Queries of one KV head as rows: softmax([H, G Q, d] x [H, d, T]) x [H, T, d]."""
    weights = torch.matmul(_grouped(query, keys) * scale, keys.transpose(2, 3)).softmax(3)
    return torch.matmul(weights, values).view(query.shape)


def matmul_keys_first(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """As `matmul`, the first product as [H, T, d] x [H, d, G Q]: some BLAS libraries are faster that way."""
    logits = torch.matmul(keys, (_grouped(query, keys) * scale).transpose(2, 3))
    return torch.matmul(logits.transpose(2, 3).softmax(3), values).view(query.shape)


def sdpa_packed(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """torch's fused attention, the query heads of one KV head as further query tokens."""
    return scaled_dot_product_attention(_grouped(query, keys), keys, values, scale=scale).view(query.shape)


def sdpa_gqa(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """torch's fused attention as transformers calls it."""
    return scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=True)


BASELINES: dict[str, DenseAttention] = {
    "bf16 matmul": matmul,
    "bf16 matmul K.q": matmul_keys_first,
    "bf16 SDPA packed": sdpa_packed,
    "bf16 SDPA gqa": sdpa_gqa,
}


def baseline(name: str, form: DenseForm, scale: float) -> Contender[tuple[Tensor, Tensor]]:
    """One of `BASELINES` on a dense form."""
    function = BASELINES[name]
    return Contender(name, "baseline", form, lambda query, held: function(query, *held, scale))


def paged(profile: str, form: PagedForm, scale: float, implementation: str) -> Contender[View]:
    """Attention on pages by one implementation of the kernels."""
    scores = Scores(scale, causal=False)
    return Contender(
        f"{profile} {implementation}",
        "fibkv",
        form,
        lambda query, view: attend(query, view, scores, implementation=implementation)[0],
    )


def exact(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attention in float64, one KV head at a time: what every contender is held to."""
    out = torch.empty(query.shape, dtype=torch.float64, device=query.device)
    grouped, outs = _grouped(query, keys), _grouped(out, keys)
    for row in range(keys.shape[0]):
        for head in range(keys.shape[1]):
            logits = grouped[row, head].double() @ keys[row, head].double().T
            outs[row, head] = (logits * scale).softmax(1) @ values[row, head].double()
    return out


def _grouped(query: Tensor, keys: Tensor) -> Tensor:
    """``[B, Hq, Q, d]`` to ``[B, H, G Q, d]``."""
    return query.view(query.shape[0], keys.shape[1], -1, query.shape[3])
