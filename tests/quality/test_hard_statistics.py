"""The default recipe on statistics that real keys have and random ones have not: outliers, biases, massive sinks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

import fibkv
from tests.codecs.conformance import gaussian
from tests.hf.architectures import COMMON

HEADS, TOKENS, DIM = 2, 260, 64
OUTLIERS = (3, 17, 40)


def plain(keys: Tensor) -> Tensor:
    return keys


def large_channels(keys: Tensor) -> Tensor:
    """A few channels 50 times as large as the others."""
    keys[..., OUTLIERS] *= 50
    return keys


def biased_channels(keys: Tensor) -> Tensor:
    """A few channels that are large and alike in every token, as biases of key projections make them."""
    keys[..., OUTLIERS] += torch.tensor([50.0, -50.0, 25.0])
    return keys


def drifting_bias(keys: Tensor) -> Tensor:
    """The same behind a rotary embedding's slow channels: it turns once in 2000 tokens."""
    angle = torch.arange(TOKENS)[:, None] / 2000 * 2 * torch.pi
    keys[..., OUTLIERS[:2]] += 50 * torch.cat([angle.cos(), angle.sin()], 1)
    return keys


def massive_sinks(keys: Tensor) -> Tensor:
    """First tokens a hundred times as long as the others."""
    keys[:, :, :4] *= 100
    return keys


def logit_error(make: Callable[[Tensor], Tensor], **options: object) -> float:
    """Rms error of logits over the spread of what softmax sees of them: each query's logits less their mean."""
    keys, values = make(gaussian(1, HEADS, TOKENS, DIM)), gaussian(1, HEADS, TOKENS, DIM, seed=1)
    cache = fibkv.Cache(LlamaConfig(**{**COMMON, "head_dim": DIM}), **options)  # type: ignore[arg-type]
    cache.update(keys, values, 0)
    decoded, _ = cache.layers[0].store.view().decode(torch.float32)
    query = gaussian(1, HEADS, 64, DIM, seed=2)
    coded = slice(4, 192)  # what is in pages and not protected
    exact, found = (query @ side[:, :, coded].mT for side in (keys, decoded))
    error, spread = (logits - logits.mean(-1, keepdim=True) for logits in (found - exact, exact))
    return float((error.square().mean() / spread.square().mean()).sqrt())


@pytest.mark.parametrize("make", [large_channels, biased_channels, drifting_bias, massive_sinks])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_the_recipes_err_as_on_plain_data(make: Callable[[Tensor], Tensor], bits: int) -> None:
    assert logit_error(make, bits=bits) < 1.5 * logit_error(plain, bits=bits)


def test_a_plain_code_does_not() -> None:
    """Why keys are centered: the bias takes the bits."""
    assert logit_error(biased_channels, profile="fib4") > 5 * logit_error(plain, profile="fib4")


@pytest.mark.parametrize(
    ("make", "flag"),
    [
        (plain, None),
        (large_channels, "channels up to "),
        (biased_channels, "as long as without their mean (heads 0, 1)"),
        (drifting_bias, "as long as without their mean (heads 0, 1)"),
        (massive_sinks, None),
    ],
)
def test_the_report_flags_the_layer(make: Callable[[Tensor], Tensor], flag: str | None) -> None:
    keys, values = make(gaussian(1, HEADS, TOKENS, DIM)), gaussian(1, HEADS, TOKENS, DIM, seed=1)
    cache = fibkv.Cache(LlamaConfig(**{**COMMON, "head_dim": DIM}))  # type: ignore[arg-type]
    cache.update(keys, values, 0)
    flags = cache.report().layers[0].flags
    assert (flags == ()) if flag is None else (len(flags) == 1 and flag in flags[0])
    assert ("hard: " in str(cache.report())) == (flag is not None)
