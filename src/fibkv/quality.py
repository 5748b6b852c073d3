"""Read-through evaluation of a compressed cache against the dense model.

What makes these figures honest:

* Every key and value that attention reads, those of the newest token included, went through the codec: the tokens
  are fed in chunks to a cache made with ``read_through=True``, which seals each chunk and hands attention what the
  codec gives back. No sinks and no tail are kept raw.
* Dense is one plain forward pass of the same model over the same tokens.
* The poison test shows that the compressed pages are what the model reads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from fibkv import metrics
from fibkv.errors import ModelError
from fibkv.hf_argument import with_cache
from fibkv.prompts import NeedlePrompt
from fibkv.quality_result import PoisonOutcome, Quality
from fibkv.report import CacheReport

CausalLM = Any
"""A causal language model of transformers, which ships no types."""


class MeasuredCache(Protocol):
    """What this module asks of a compressed cache beyond being a cache of transformers."""

    def report(self) -> CacheReport:
        """Counted bytes, per layer what is compressed, and the dense copies that attention had to make."""

    def corrupt_page(self, *, layer: int, row: int, page: int) -> AbstractContextManager[object]:
        """Damage the key codes of one page in memory, and restore them on exit."""


class CacheFactory(Protocol):
    """Makes an empty cache for a model."""

    def __call__(self, model: CausalLM, *, read_through: bool) -> MeasuredCache:
        """With ``read_through``, all that attention reads went through the codec, the newest tokens included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheVariant:
    """One kind of cache under test.

    Attributes:
        name: short name, unique among the variants of a run.
        title: what a reader of the table sees.
        make_cache: makes an empty cache.
        attention: switches attention on pages on for a model while the context lasts.
    """

    name: str
    title: str
    make_cache: CacheFactory
    attention: Callable[[CausalLM], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """Figures per predicted token, each [tokens]: ``nll`` and ``kl`` float64 in nats, ``top1`` bool."""

    nll: Tensor
    kl: Tensor
    top1: Tensor


@torch.no_grad()
def dense_logits(model: CausalLM, ids: Tensor) -> Tensor:
    """Logits of one plain forward pass without a cache, [tokens, vocab], for ``ids`` [tokens]."""
    logits: Tensor = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0]
    return logits


@torch.no_grad()
def cached_logits(model: CausalLM, ids: Tensor, cache: object, *, chunk_tokens: int) -> Tensor:
    """Logits of all positions, the tokens being fed chunk by chunk to the model with the cache.

    Args:
        model: in whatever attention mode the caller has switched on.
        ids: token ids [tokens].
        cache: an empty cache; it holds all tokens afterwards. One made with ``read_through=True`` makes this the
            read-through evaluation.
        chunk_tokens: tokens per forward pass.

    Returns:
        [tokens, vocab], dtype of the model.
    """
    chunks = torch.split(ids[None].to(model.device), chunk_tokens, dim=1)
    return torch.cat([model(input_ids=chunk, **with_cache(cache), use_cache=True).logits[0] for chunk in chunks])


def score_tokens(dense: Tensor, logits: Tensor, ids: Tensor) -> TokenScores:
    """Compare the predictions of all tokens but the first, which nothing predicts.

    Args:
        dense: logits of the dense model, [tokens, vocab].
        logits: logits of the model under test, same shape.
        ids: the tokens themselves, int64 [tokens].

    Raises:
        ContractError: shapes that do not fit, or logits that are not finite.
    """
    dense, logits, targets = dense[:-1], logits[:-1], ids[1:].to(logits.device)
    return TokenScores(
        nll=metrics.token_nll(logits, targets),
        kl=metrics.kl_divergence(dense, logits),
        top1=metrics.top1_agreement(dense, logits),
    )


def summarize(scores: list[TokenScores]) -> Quality:
    """The summary over the tokens of all windows together."""
    kl = torch.cat([score.kl for score in scores])
    return Quality(
        perplexity=metrics.perplexity(torch.cat([score.nll for score in scores])),
        kl_mean=kl.mean().item(),
        kl_p99=kl.quantile(0.99).item(),
        top1=torch.cat([score.top1 for score in scores]).double().mean().item(),
    )


def count_recalled(logits: Tensor, prompt: NeedlePrompt) -> int:
    """How many planted values were recalled, teacher-forced: each token of the value must be the arg max.

    Args:
        logits: of the prompt, [tokens, vocab]; row t predicts token t + 1.
        prompt: the ids and the spans of the values.
    """
    predicted = logits.argmax(-1).cpu()
    return sum(torch.equal(predicted[start - 1 : stop - 1], prompt.ids[start:stop]) for start, stop in prompt.answers)


def poison(model: CausalLM, variant: CacheVariant, ids: Tensor, *, chunk_tokens: int) -> PoisonOutcome:
    """The poison test: damage one page in memory, and the next token's logits must change.

    The cache is filled with all tokens but the last, in read-through mode; the last one is fed by `poison_filled`.

    Args:
        model: the model.
        variant: the cache under test.
        ids: token ids [tokens], enough to seal a page.
        chunk_tokens: tokens per forward pass.

    Raises:
        ModelError: the cache compresses no layer of this model.
    """
    cache = variant.make_cache(model, read_through=True)
    with variant.attention(model):
        cached_logits(model, ids[:-1], cache, chunk_tokens=chunk_tokens)
        return poison_filled(model, cache, ids[-1:])


def poison_filled(model: CausalLM, cache: MeasuredCache, token: Tensor) -> PoisonOutcome:
    """The poison test on a filled cache, which is left as it was.

    A token is fed to forks of the cache (which share its pages): intact, with the first page of its first compressed
    layer damaged, restored.

    Args:
        model: in the attention mode that the caller has switched on.
        cache: with at least one page.
        token: id of the token that comes next, [1].

    Raises:
        ModelError: the cache compresses no layer of this model.
    """
    layer = _first_compressed_layer(cache.report())
    intact = fork_logits(model, cache, token)
    with cache.corrupt_page(layer=layer, row=0, page=0):
        damaged = fork_logits(model, cache, token)
    restored = fork_logits(model, cache, token)
    return poison_outcome(intact, damaged, restored)


def poison_outcome(intact: Tensor, damaged: Tensor, restored: Tensor) -> PoisonOutcome:
    """The outcome of a poison test from the outputs, equal in shape, before, while and after a page was damaged."""
    # Damaged codes may decode to inf or nan: then the output has moved as far as a number can say.
    change = (damaged.double() - intact.double()).abs().nan_to_num(nan=torch.finfo(torch.float64).max)
    return PoisonOutcome(moved=change.max().item(), restored=torch.equal(restored, intact))


@torch.no_grad()
def fork_logits(model: CausalLM, cache: object, token: Tensor) -> Tensor:
    """Logits [vocab], float64, after one more token [1], fed to a copy of the cache."""
    ids = token[None].to(model.device)
    logits: Tensor = model(input_ids=ids, **with_cache(copy.deepcopy(cache)), use_cache=True).logits[0, -1]
    return logits.double()


def _first_compressed_layer(report: CacheReport) -> int:
    for layer in report.layers:
        if layer.compressed:
            return layer.layer
    raise ModelError(f"no layer of this model is compressed: {'; '.join({layer.reason for layer in report.layers})}")


def decode_speed(model: CausalLM, ids: Tensor, *, new_tokens: int, cache: object | None = None) -> float:
    """Tokens per second of greedy decoding after a prompt, the prompt's own pass not counted.

    Args:
        model: in whatever attention mode the caller has switched on.
        ids: the prompt [tokens].
        new_tokens: how many tokens to generate, at least 2.
        cache: an empty cache, or None for the one that ``generate`` makes (dense).
    """
    times = decode_times(model, ids, new_tokens=new_tokens, cache=cache)
    return len(times) / sum(times)


def decode_times(
    model: CausalLM,
    ids: Tensor,
    *,
    new_tokens: int,
    cache: object | None = None,
    between: Callable[[], object] | None = None,
) -> list[float]:
    """Seconds of each greedily decoded token but the first, which comes with the prompt's own pass.

    Args:
        model: in whatever attention mode the caller has switched on.
        ids: the prompt [tokens], of which the cache may hold all but the last already.
        new_tokens: how many tokens to generate, at least 2.
        cache: see `decode_speed`.
        between: called after each token, its time not counted.
    """
    clock = _TokenClock(between)
    prompt = ids[None].to(model.device)
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        **with_cache(cache),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        streamer=clock,
    )
    # The first interval ends with the prompt's own pass.
    return clock.intervals[1:]


class _TokenClock:
    """A streamer of transformers that notes how long each token took; it is called with the prompt first."""

    def __init__(self, between: Callable[[], object] | None) -> None:
        self.intervals: list[float] = []
        self._between = between
        self._started: float | None = None

    def put(self, value: Tensor) -> None:  # noqa: ARG002  the streamer's signature
        now = perf_counter()
        if self._started is not None:
            self.intervals.append(now - self._started)
        if self._between is not None:
            self._between()
            now = perf_counter()
        self._started = now

    def end(self) -> None:
        """Nothing is left to flush."""
