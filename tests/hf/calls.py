"""The calls that tests on tiny models make."""

from __future__ import annotations

import torch
import transformers as tf
from torch import Tensor

import fibkv
from fibkv.hf_argument import with_cache
from fibkv.regions import ProtectedRegions
from tests.hf.oracle import FIRST, LAST, PAGE

POLICY = fibkv.Policy.per_token(ProtectedRegions(first_tokens_raw=FIRST, last_tokens_raw=LAST))

Options = dict[str, object]


def cache_for(model: tf.PreTrainedModel, implementation: str = "reference", profile: str = "fib4") -> fibkv.Cache:
    """A cache that keeps raw and seals what `tests.hf.oracle` does.

    Tokens are compared with those of a dense cache, so the kernels are the reference ones unless a test says otherwise.
    """
    return fibkv.Cache(model, profile=profile, policy=POLICY, tokens_per_page=PAGE, implementation=implementation)


def ids(batch: int = 1, tokens: int = 60, seed: int = 0) -> Tensor:
    """Token ids ``[batch, tokens]``, none of them the padding token."""
    return torch.randint(2, 199, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def generate(model: tf.PreTrainedModel, cache: object, options: Options) -> Tensor:
    """The tokens that a model generates with a cache, prompt included: greedily, or sampled with a fixed seed."""
    torch.manual_seed(5)
    return model.generate(**{"max_new_tokens": 12, "do_sample": False, **options}, **with_cache(cache))


def logits_along(model: tf.PreTrainedModel, chunks: list[Tensor], cache: object) -> Tensor:
    """Logits of each chunk's last token ``[chunks, vocabulary]``, the chunks fed one after the other."""
    with torch.no_grad():
        return torch.cat([model(chunk, **with_cache(cache)).logits[:, -1] for chunk in chunks])
