"""Attention on compressed pages, as transformers calls it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fibkv.attend import Scores, attend
from fibkv.errors import ModelError
from fibkv.handle import Handle, outside_graphs
from fibkv.hf_prompt import checked_prompts
from fibkv.hf_switch import switched
from fibkv.view import View

ATTENTION_NAME = "fibkv"
# What changes the result and is not handled: additive biases, sparse attention by an index, other kinds of sinks.
_REFUSED = ("position_bias", "indices", "block_indices", "sinks")


@outside_graphs
def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: on pages for handles, `sdpa` for plain tensors.

    Args:
        module: the attention module.
        query: ``[B, Hq, Q, d]``.
        key: handle or tensor ``[B, H, L, d]``.
        value: handle or tensor ``[B, H, L, d_value]``.
        attention_mask: ``[B, 1, Q, L]`` bool or floating, or None.
        dropout: must be 0, except on plain tensors without softcap and sinks.
        scaling: factor of the logits; default 1/sqrt(d).
        is_causal: without a mask, whether queries see only their own past; default: what the module says.
        **kwargs: ``softcap`` and the sinks ``s_aux [Hq]`` are honored, those of `_REFUSED` are refused.

    Returns:
        ``[B, Q, Hq, d_value]`` in the query's dtype, and None for the weights.

    Raises:
        ModelError: an argument that changes the result and is not handled.
    """
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise ModelError(f"fibkv.attention does not handle {name!r}: run the model without it, its cache works too")
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    key, value = _of_one_source(key, value)
    if isinstance(key, Handle):
        view = key.source.view
    elif softcap is None and sinks is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return out, None
    else:
        # `sdpa` knows neither softcap nor sinks: plain tensors are a cache that is all tail.
        view = View.of_tensors(key, value)
    if dropout:
        raise ModelError(f"fibkv.attention has no dropout, got {dropout}: call model.eval()")
    scores = Scores(
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=softcap,
        mask=attention_mask,
        causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
    )
    out, lse = attend(query, view, scores, implementation=view.implementation)
    if sinks is not None:
        # A sink is one more logit that carries no value: it takes its share of the softmax.
        out = out * torch.sigmoid(lse - sinks.float()[:, None]).unsqueeze(-1).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def _of_one_source(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Both as handles if they are those of one update, else both as plain tensors.

    Some models change one of them on the way (DiffLlama splits its values): pages then no longer hold what it is.
    """
    if isinstance(key, Handle) and isinstance(value, Handle) and key.source is value.source:
        return key, value
    return (key.dense() if isinstance(key, Handle) else key), (value.dense() if isinstance(value, Handle) else value)


# Both registries: a name that only the first one knows gets no mask at all, silently.
AttentionInterface.register(ATTENTION_NAME, attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


@contextmanager
def attention(model: PreTrainedModel) -> Iterator[None]:
    """Switches a model to attention on compressed pages while the context lasts.

    Without it a `Cache` works too: whatever attention the model uses then decodes the layer at every step, and
    `Cache.report` counts that.

    Prompts of ``model.generate`` that a filled cache cannot go on with are refused while it lasts (`fibkv.hf_prompt`).

    Contexts of one model may be nested, and overlap in threads.

    Args:
        model: a model of transformers. One that does not follow its attention interface keeps its own attention.

    Raises:
        ModelError: it is none.
    """
    # Wrappers, such as those of adapters, will do.
    if not hasattr(model, "set_attn_implementation"):
        raise ModelError(f"fibkv.attention: expected a model of transformers, got {type(model).__name__}")
    with switched(model, ATTENTION_NAME), checked_prompts(model):
        yield
