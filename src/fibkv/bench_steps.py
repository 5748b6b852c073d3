"""`fibkv bench steps`: whole decode steps through transformers' generate, on caches filled with the same vectors.

What keeps it honest: the logits on pages are held to those of dense attention on the dequantized values; damage to a
page must move them; dense copies are counted and must be 0; before every step more memory is read than the caches
of the machine hold, as the layers of a large model would do; caches take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

from fibkv.bench_caches import CacheContender, cache_contenders, dense_copy, fill, random_llama
from fibkv.bench_models import TOKEN, Trial, rounds_of, rows_of
from fibkv.bench_read import PureRead, cold_nbytes
from fibkv.bench_result import StepResult
from fibkv.bench_settings import StepSettings
from fibkv.hf import Cache
from fibkv.hf_switch import switched
from fibkv.machine import Conditions
from fibkv.progress import ProgressCallback, StepCounter
from fibkv.quality import CausalLM, decode_times, fork_logits
from fibkv.threads import torch_threads


def run_steps(settings: StepSettings, progress: ProgressCallback) -> StepResult:
    """Measures the decode steps of every cache.

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
    # Each turn decodes one token more than it times, and `generate` is handed the one before.
    positions = settings.context + settings.rounds * (settings.tokens + 1) + 1
    model = random_llama(settings, positions)
    contenders, skipped = cache_contenders(model, settings)
    cache_bytes = cold_nbytes(settings.cache_bytes, 2)
    step = StepCounter(progress, len(contenders) + settings.rounds)
    with torch_threads(num_threads):
        read = PureRead(cache_bytes)
        trials = []
        for contender in contenders:
            step(f"filling and checking {contender.name}")
            trials.append(StepTrial(model, settings, contender, read.sweep))
        rounds = rounds_of(trials, settings.rounds, step)
        for trial in trials:
            trial.measure(trial.cache)
    return StepResult(
        conditions=conditions,
        rows=rows_of(trials, rounds, tokens_per_call=1, baselines={"dense", "quantized"}),
        skipped=skipped,
        seconds=perf_counter() - started,
        settings=settings,
        cache_bytes=cache_bytes,
    )


class StepTrial(Trial):
    """A filled cache that a few tokens are added to in each turn."""

    def __init__(
        self, model: CausalLM, settings: StepSettings, contender: CacheContender, between: Callable[[], object]
    ) -> None:
        super().__init__(model, settings, contender)
        self._tokens = settings.tokens
        self._between = between
        self.cache: Any = contender.make()
        fill(self.cache, settings, settings.context)
        if contender.kind != "quantized":
            with switched(model, contender.attention):
                logits = fork_logits(model, self.cache, TOKEN)
            dense = dense_copy(self.cache, model) if isinstance(self.cache, Cache) else self.cache
            # The model as it is made uses transformers' default attention.
            self.check(self.cache, logits, fork_logits(model, dense, TOKEN))

    def turn(self) -> list[float]:
        """Seconds of the decoded tokens but the first."""
        # Only the last token is fed: the cache holds all before it, whatever their ids are said to be.
        ids = torch.zeros(self.cache.get_seq_length() + 1, dtype=torch.long)
        with switched(self.model, self.contender.attention):
            return decode_times(self.model, ids, new_tokens=self._tokens + 1, cache=self.cache, between=self._between)
