"""The demonstration: one model, dense against compressed caches, on text and on the needle task.

`run_demo` measures and returns a `fibkv.demo_result.DemoResult`; `fibkv.demo_view` shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fibkv.demo_result import DemoResult, DemoSettings, DenseRow, VariantRow
from fibkv.errors import ContractError
from fibkv.hf import Cache
from fibkv.hf_argument import cache_of
from fibkv.hf_attention import attention
from fibkv.progress import ProgressCallback, StepCounter
from fibkv.prompts import NeedlePrompt, bos_prefix, needle_prompts, spread_windows
from fibkv.quality import (
    CacheVariant,
    CausalLM,
    TokenScores,
    decode_speed,
    summarize,
)
from fibkv.read_through import DENSE, ReadThrough
from fibkv.threads import torch_threads


def standard_variants() -> tuple[CacheVariant, ...]:
    """The caches that the demonstration compares with dense, from the largest to the smallest."""
    return tuple(
        CacheVariant(name=name, title=title, make_cache=partial(Cache, raw_dtype="bf16", **chosen), attention=attention)
        for name, title, chosen in (
            ("raw", "raw bf16", {"profile": "raw"}),
            ("int8", "int8", {"bits": 8}),
            ("fp8", "fp8 e4m3", {"profile": "fp8"}),
            ("bits4", "4 bits (default)", {"bits": 4}),
            ("bits3", "3 bits", {"bits": 3}),
            ("bits2", "2 bits", {"bits": 2}),
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
    _check_positions(model, settings)
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
    with torch_threads(settings.num_threads):
        dense, rows = run.rows(windows, prompts)
    return DemoResult(
        model=name,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        device=f"CPU, threads: {settings.num_threads}" if model.device.type == "cpu" else str(model.device),
        bos=bool(bos_prefix(tokenizer)),
        settings=settings,
        needles_planted=sum(len(prompt.answers) for prompt in prompts),
        caveats=caveats,
        dense=dense,
        variants=rows,
        seconds=perf_counter() - started,
    )


def _check_positions(model: CausalLM, settings: DemoSettings) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and settings.window_tokens + settings.new_tokens > limit:
        expected = f"at most {limit - settings.new_tokens}, the model's positions less the decoded tokens"
        raise ContractError("window_tokens", expected, settings.window_tokens)


class _Run:
    """The measurements of one run; the methods behind `rows` give figures by name of the row."""

    def __init__(
        self, model: CausalLM, variants: Sequence[CacheVariant], settings: DemoSettings, progress: ProgressCallback
    ) -> None:
        self._model = model
        self._variants = variants
        self._settings = settings
        per_row = settings.num_windows + settings.num_prompts + settings.rounds
        self._step = StepCounter(progress, len(variants) + (1 + len(variants)) * per_row)
        self._through = ReadThrough(model, variants, chunk_tokens=settings.chunk_tokens, step=self._step)

    def rows(
        self, windows: Sequence[Tensor], prompts: Sequence[NeedlePrompt]
    ) -> tuple[DenseRow, tuple[VariantRow, ...]]:
        """Measure everything; sizes and decoding are those of the first window."""
        # First, because the figures of a cache that is not read mean nothing.
        poisoned = self._through.poison_outcomes(windows[0])
        scores = self._through.window_scores(windows)
        recalled = self._through.recalled(prompts)
        speeds = self._speeds(windows[0])
        dense = _dense_row(self._model, windows[0], scores[DENSE], recalled[DENSE], speeds[DENSE])
        return dense, tuple(
            VariantRow(
                name=variant.name,
                title=variant.title,
                bits_per_element=reports[0].bits_per_element,
                nbytes=reports[0].nbytes,
                quality=summarize(scores[variant.name]),
                recalled=recalled[variant.name],
                tokens_per_second=speeds[variant.name],
                materialized=sum(report.materialized for report in reports),
                poison=poisoned[variant.name],
            )
            for variant, reports in zip(self._variants, self._through.reports.values(), strict=True)
        )

    def _speeds(self, ids: Tensor) -> dict[str, float]:
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
                self._through.reports[variant.name].append(cache.report())
        return {name: median(speeds) for name, speeds in rounds.items()}

    def _speed(self, ids: Tensor, cache: object | None) -> float:
        return decode_speed(self._model, ids, new_tokens=self._settings.new_tokens, cache=cache)


@torch.no_grad()
def _dense_row(
    model: CausalLM, ids: Tensor, scores: list[TokenScores], recalled: int, tokens_per_second: float
) -> DenseRow:
    layers = cache_of(model(input_ids=ids[None].to(model.device), use_cache=True)).layers
    slots = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    held = [tensor for tensor in slots if isinstance(tensor, Tensor)]  # recurrent layers have neither
    nbytes = sum(tensor.nbytes for tensor in held)
    return DenseRow(
        bits_per_element=8 * nbytes / sum(tensor.numel() for tensor in held),
        nbytes=nbytes,
        perplexity=summarize(scores).perplexity,
        recalled=recalled,
        tokens_per_second=tokens_per_second,
    )
