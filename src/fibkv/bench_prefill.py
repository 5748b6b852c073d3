"""`fibkv bench prefill`: a prompt through a whole model into each cache, against a dense one.

Attention in an empty cache is the same dense computation for all: what differs is the encoding of the keys and values.
Behind tokens that are cached already it reads them as the cache holds them. The cache of the first, untimed pass is
checked: its logits are those of dense attention, and damage to a page moves the logits of the next token.
"""

from __future__ import annotations

import copy
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fibkv.bench_caches import CacheContender, cache_contenders, dense_copy, fill, random_llama
from fibkv.bench_models import Trial, rounds_of, rows_of
from fibkv.bench_result import PrefillResult
from fibkv.bench_settings import PrefillSettings
from fibkv.hf import Cache
from fibkv.hf_argument import with_cache
from fibkv.hf_switch import switched
from fibkv.machine import Conditions
from fibkv.progress import ProgressCallback, StepCounter
from fibkv.quality import CausalLM
from fibkv.threads import torch_threads


def run_prefill(settings: PrefillSettings, progress: ProgressCallback) -> PrefillResult:
    """Measures the prefill of every cache.

    Args:
        settings: what to measure.
        progress: told before each step of the run.

    Raises:
        KernelError: the implementation is not available.
        ContractError: a profile that does not fit the head_dim.
    """
    started = perf_counter()
    num_threads = settings.num_threads or torch.get_num_threads()
    conditions = Conditions.now(num_threads)
    model = random_llama(settings, settings.cached + settings.context + 1)
    generator = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(model.config.vocab_size, (1, settings.context), generator=generator)
    found, skipped = cache_contenders(model, settings)
    # A dense prefill is the same whatever reads the cache later: one row of it.
    contenders = [contender for contender in found if contender.kind != "dense" or contender.attention == "sdpa"]
    step = StepCounter(progress, len(contenders) + settings.rounds)
    with torch_threads(num_threads):
        trials: list[PrefillTrial] = []
        for contender in contenders:
            step(f"checking {contender.name}")
            trials.append(PrefillTrial(model, settings, contender, ids, trials[0].logits if trials else None))
        rounds = rounds_of(trials, settings.rounds, step)
    return PrefillResult(
        conditions=conditions,
        rows=rows_of(trials, rounds, tokens_per_call=settings.context, baselines={"dense"}),
        skipped=skipped,
        seconds=perf_counter() - started,
        settings=settings,
    )


class PrefillTrial(Trial):
    """A prompt that goes into a new cache in each turn, or behind what a copy of a filled one holds.

    Attributes:
        logits: of the token after the prompt, [vocab].
    """

    def __init__(
        self,
        model: CausalLM,
        settings: PrefillSettings,
        contender: CacheContender,
        ids: Tensor,
        expected: Tensor | None,
    ) -> None:
        """Fills a first cache and checks it; ``expected`` are the logits of the first contender."""
        super().__init__(model, settings, contender)
        self._ids = ids
        self._filled = contender.make()
        if settings.cached:
            fill(self._filled, settings, settings.cached)
            # What a compressed cache holds is not what the dense one does.
            expected = self._dense_logits(self._filled) if isinstance(self._filled, Cache) else None
        cache = copy.deepcopy(self._filled)
        self.logits, _ = self._prefill(cache, contender.attention)
        self.check(cache, self.logits, self.logits if expected is None else expected)
        self.measure(cache)

    def turn(self) -> list[float]:
        """Seconds of one prefill."""
        _, seconds = self._prefill(copy.deepcopy(self._filled), self.contender.attention)
        return [seconds]

    def _dense_logits(self, filled: Cache) -> Tensor:
        logits, _ = self._prefill(dense_copy(filled, self.model), "sdpa")
        return logits

    @torch.no_grad()
    def _prefill(self, cache: Any, attention: str) -> tuple[Tensor, float]:
        with switched(self.model, attention):
            started = perf_counter()
            out = self.model(input_ids=self._ids, **with_cache(cache), use_cache=True, logits_to_keep=1)
            seconds = perf_counter() - started
        return out.logits[0, -1], seconds
