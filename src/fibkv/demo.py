"""The demonstration: one model, dense against compressed caches, on text and on the needle task (rank 6).

`run_demo` measures and returns a `DemoResult`, plain data with a JSON form; `fibkv.demo_view` shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fibkv.contract import Contract, Count
from fibkv.errors import ContractError
from fibkv.hf import Cache, attention
from fibkv.prompts import NeedlePrompt, bos_prefix, needle_prompts, spread_windows
from fibkv.quality import (
    CacheVariant,
    CausalLM,
    PoisonOutcome,
    Quality,
    TokenScores,
    cached_logits,
    count_recalled,
    decode_speed,
    dense_logits,
    poison,
    score_tokens,
    summarize,
)
from fibkv.report import CacheReport

ProgressCallback = Callable[[str, int, int], None]
"""Called before each step with what comes next, the steps done, and the steps in all."""

DENSE = "dense"
"""Name of the row that the others are compared with."""


class DemoSettings(Contract):
    """How much is measured.

    Attributes:
        num_windows: windows of text, spread evenly.
        window_tokens: tokens of a window, of a needle prompt and of the prompt before decoding.
        chunk_tokens: tokens per forward pass of the read-through evaluation.
        num_prompts: needle prompts.
        num_needles: planted values per prompt.
        new_tokens: tokens decoded per speed measurement.
        rounds: speed measurements per row, interleaved.
        seed: of the needle prompts.
    """

    num_windows: Count = 6
    window_tokens: Count = 1024
    chunk_tokens: Count = 128
    num_prompts: Count = 12
    num_needles: Count = 8
    new_tokens: Count = 48
    rounds: Count = 3
    seed: int = 0


class DenseRow(Contract):
    """The dense model's figures.

    Attributes:
        bits_per_element: of the dtype that its cache holds, which is the model's.
        nbytes: of its cache at one window of tokens.
        perplexity: on the windows.
        recalled: planted values recalled.
        tokens_per_second: greedy decoding after a prompt of one window.
    """

    bits_per_element: float
    nbytes: int
    perplexity: float
    recalled: int
    tokens_per_second: float


class VariantRow(Contract):
    """One compressed cache's figures.

    Attributes:
        name: the variant's short name.
        title: what a reader of the table sees.
        bits_per_element: all counted bytes times 8 over elements, at one window of tokens.
        nbytes: all counted bytes at one window of tokens.
        quality: against dense, read-through.
        recalled: planted values recalled.
        tokens_per_second: greedy decoding after a prompt of one window.
        materialized: dense copies that attention had to make; 0 when it always read the pages.
        poison: outcome of the poison test.
    """

    name: str
    title: str
    bits_per_element: float
    nbytes: int
    quality: Quality
    recalled: int
    tokens_per_second: float
    materialized: int
    poison: PoisonOutcome


class DemoResult(Contract):
    """All figures of one run, and the conditions that they were taken under.

    Attributes:
        model: name of the model.
        num_parameters: weights of the model.
        dtype: of the model while it ran.
        device: that the model ran on, and its threads if it is a CPU.
        bos: whether each window starts with a beginning-of-sequence token.
        settings: how much was measured.
        needles_planted: values to recall in all prompts together.
        caveats: what has to be said of this model.
        dense: the yardstick.
        variants: one row per compressed cache.
        seconds: duration of the run.
    """

    model: str
    num_parameters: int
    dtype: str
    device: str
    bos: bool
    settings: DemoSettings
    needles_planted: int
    caveats: tuple[str, ...]
    dense: DenseRow
    variants: tuple[VariantRow, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every compressed cache passed the poison test and was read without dense copies."""
        return all(row.poison.passed and row.materialized == 0 for row in self.variants)


def standard_variants() -> tuple[CacheVariant, ...]:
    """The caches that the demonstration compares with dense, from the largest to the smallest."""
    return tuple(
        CacheVariant(
            name=profile,
            title=title,
            make_cache=partial(Cache, profile=profile, raw_dtype="bf16"),
            attention=attention,
        )
        for profile, title in (
            ("raw", "raw pages, bf16"),
            ("int8", "int8"),
            ("fp8", "fp8 e4m3"),
            ("fib4", "4-bit FibQuant"),
            ("fib2", "2-bit FibQuant"),
        )
    )


def run_demo(
    model: CausalLM,
    tokenizer: Any,
    text: str,
    *,
    name: str,
    variants: Sequence[CacheVariant],
    settings: DemoSettings,
    caveats: tuple[str, ...],
    progress: ProgressCallback,
) -> DemoResult:
    """Measure dense and each variant on the same windows, the same needle prompts and the same decoding prompt.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer, a fast one.
        text: that the model was not trained on; also the filler of the needle task.
        name: of the model, for the result.
        variants: the compressed caches.
        settings: how much to measure.
        caveats: what has to be said of this model wherever its figures are printed.
        progress: told before each step.

    Raises:
        ContractError: the text is too short, or the windows are longer than the model's positions.
        ModelError: the model or its tokenizer cannot be served.
    """
    started = perf_counter()
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", settings.window_tokens)
    if settings.window_tokens + settings.new_tokens > limit:
        expected = f"at most {limit - settings.new_tokens}, the model's positions less the decoded tokens"
        raise ContractError("window_tokens", expected, settings.window_tokens)
    windows = spread_windows(tokenizer, text, num_windows=settings.num_windows, window_tokens=settings.window_tokens)
    prompts = needle_prompts(
        tokenizer,
        text,
        num_prompts=settings.num_prompts,
        num_tokens=settings.window_tokens,
        num_needles=settings.num_needles,
        seed=settings.seed,
    )
    run = _Run(model, variants, settings, progress)
    # First, because the figures of a cache that is not read mean nothing.
    poisoned = run.poison_outcomes(windows[0])
    scores = run.window_scores(windows)
    recalled = run.recalled(prompts)
    speeds = run.speeds(windows[0])
    return DemoResult(
        model=name,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        device=f"{torch.get_num_threads()} CPU threads" if model.device.type == "cpu" else str(model.device),
        bos=bool(bos_prefix(tokenizer)),
        settings=settings,
        needles_planted=sum(len(prompt.answers) for prompt in prompts),
        caveats=caveats,
        dense=_dense_row(model, windows[0], scores[DENSE], recalled[DENSE], speeds[DENSE]),
        variants=tuple(
            VariantRow(
                name=variant.name,
                title=variant.title,
                # The first report is that of a cache that holds exactly one window.
                bits_per_element=run.reports[variant.name][0].bits_per_element,
                nbytes=run.reports[variant.name][0].nbytes,
                quality=summarize(scores[variant.name]),
                recalled=recalled[variant.name],
                tokens_per_second=speeds[variant.name],
                materialized=sum(report.materialized for report in run.reports[variant.name]),
                poison=poisoned[variant.name],
            )
            for variant in variants
        ),
        seconds=perf_counter() - started,
    )


class _Run:
    """The measurements of one run; each method gives figures by name of the row, dense first.

    Attributes:
        reports: by name of the variant, the report of every cache that was read, in order.
    """

    def __init__(
        self, model: CausalLM, variants: Sequence[CacheVariant], settings: DemoSettings, progress: ProgressCallback
    ) -> None:
        self.reports: dict[str, list[CacheReport]] = {variant.name: [] for variant in variants}
        if len(self.reports) < len(variants) or DENSE in self.reports:
            raise ContractError("variants", f"different names, none of them {DENSE!r}", [v.name for v in variants])
        self._model = model
        self._variants = variants
        self._settings = settings
        self._progress = progress
        self._steps_done = 0
        per_row = settings.num_windows + settings.num_prompts + settings.rounds
        self._steps = len(variants) + (1 + len(variants)) * per_row

    def poison_outcomes(self, ids: Tensor) -> dict[str, PoisonOutcome]:
        outcomes = {}
        for variant in self._variants:
            self._step(f"poison test: {variant.title}")
            outcomes[variant.name] = poison(self._model, variant, ids, chunk_tokens=self._settings.chunk_tokens)
        return outcomes

    def window_scores(self, windows: Sequence[Tensor]) -> dict[str, list[TokenScores]]:
        scores: dict[str, list[TokenScores]] = {DENSE: [], **{variant.name: [] for variant in self._variants}}
        # One window at a time, so that the dense logits of one window only are held.
        for ids in windows:
            self._step("text: dense")
            dense = dense_logits(self._model, ids)
            scores[DENSE].append(score_tokens(dense, dense, ids))
            for variant in self._variants:
                self._step(f"text: {variant.title}")
                scores[variant.name].append(score_tokens(dense, self._read_through(variant, ids), ids))
        return scores

    def recalled(self, prompts: Sequence[NeedlePrompt]) -> dict[str, int]:
        counts = dict.fromkeys([DENSE, *self.reports], 0)
        for prompt in prompts:
            self._step("needles: dense")
            counts[DENSE] += count_recalled(dense_logits(self._model, prompt.ids), prompt)
            for variant in self._variants:
                self._step(f"needles: {variant.title}")
                counts[variant.name] += count_recalled(self._read_through(variant, prompt.ids), prompt)
        return counts

    def speeds(self, ids: Tensor) -> dict[str, float]:
        """Medians over rounds; the rows take turns, so that a busy moment of the machine meets all of them."""
        rounds: dict[str, list[float]] = {DENSE: [], **{variant.name: [] for variant in self._variants}}
        for _ in range(self._settings.rounds):
            self._step("decoding: dense")
            rounds[DENSE].append(self._speed(ids, None))
            for variant in self._variants:
                self._step(f"decoding: {variant.title}")
                cache = variant.make_cache(self._model, read_through=False)
                with variant.attention(self._model):
                    rounds[variant.name].append(self._speed(ids, cache))
                self.reports[variant.name].append(cache.report())
        return {name: median(speeds) for name, speeds in rounds.items()}

    def _speed(self, ids: Tensor, cache: object | None) -> float:
        return decode_speed(self._model, ids, new_tokens=self._settings.new_tokens, cache=cache)

    def _read_through(self, variant: CacheVariant, ids: Tensor) -> Tensor:
        cache = variant.make_cache(self._model, read_through=True)
        with variant.attention(self._model):
            logits = cached_logits(self._model, ids, cache, chunk_tokens=self._settings.chunk_tokens)
        self.reports[variant.name].append(cache.report())
        return logits

    def _step(self, label: str) -> None:
        self._progress(label, self._steps_done, self._steps)
        self._steps_done += 1


@torch.no_grad()
def _dense_row(
    model: CausalLM, ids: Tensor, scores: list[TokenScores], recalled: int, tokens_per_second: float
) -> DenseRow:
    layers = model(input_ids=ids[None].to(model.device), use_cache=True).past_key_values.layers
    held = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    nbytes = sum(tensor.nbytes for tensor in held)
    return DenseRow(
        bits_per_element=8 * nbytes / sum(tensor.numel() for tensor in held),
        nbytes=nbytes,
        perplexity=summarize(scores).perplexity,
        recalled=recalled,
        tokens_per_second=tokens_per_second,
    )
