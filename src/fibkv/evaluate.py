"""`fibkv eval`: compressed caches against the same model's dense cache, in all the ways that reviewers ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, Self

import torch
from torch import Tensor

from fibkv.attention_errors import AttentionErrors, attention_errors, mean_errors
from fibkv.digest import digest_bytes
from fibkv.errors import ContractError
from fibkv.eval_caches import EvalVariant
from fibkv.eval_result import EvalResult, EvalRow, EvalSettings, HeadErrors
from fibkv.handle import Handle
from fibkv.hf_model import model_digest
from fibkv.hf_observe import Observation, observe
from fibkv.machine import Conditions
from fibkv.progress import ProgressCallback, StepCounter
from fibkv.prompts import NeedlePrompt, bos_prefix, needle_prompts, spread_windows
from fibkv.quality import CausalLM, TokenScores, cached_logits, dense_logits, score_tokens, summarize
from fibkv.quality_result import PoisonOutcome
from fibkv.read_through import DENSE, ReadThrough
from fibkv.report import CacheReport
from fibkv.threads import torch_threads

TEXT_DOMAIN = "fibkv_text_v1"


def run_eval(
    model: CausalLM,
    tokenizer: Any,
    text: str,
    *,
    name: str,
    variants: Sequence[EvalVariant],
    skipped: tuple[tuple[str, str], ...],
    settings: EvalSettings,
    caveats: tuple[str, ...],
    progress: ProgressCallback,
) -> EvalResult:
    """Measure dense and each variant on the same windows, needle prompts and decoded text.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer, a fast one.
        text: that the model was not trained on; also the filler of the needle task.
        name: of the model, for the result.
        variants: the compressed caches; those that keep sinks and newest tokens raw were made with the settings'.
        skipped: caches that could not be made, with the reasons.
        settings: how much to measure.
        caveats: what has to be said of this model wherever its figures are printed.
        progress: told before each step.

    Raises:
        ContractError: the text is too short, or the windows are longer than the model's positions.
        ModelError: the model or its tokenizer cannot be served.
    """
    started = perf_counter()
    _check(model, settings)
    conditions = Conditions.now(settings.num_threads)
    material = _Material.of(tokenizer, text, settings)
    step = StepCounter(progress, _num_steps(len(variants), settings))
    with torch_threads(settings.num_threads):
        found = _measure(model, variants, material, settings, step)
    return EvalResult(
        model=name,
        model_digest=model_digest(model.config),
        text_digest=digest_bytes(TEXT_DOMAIN, text.encode()),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        bos=bool(bos_prefix(tokenizer)),
        settings=settings,
        planted_single=sum(len(prompt.answers) for prompt in material.single),
        planted_multi=sum(len(prompt.answers) for prompt in material.multi),
        dense_perplexity=summarize(found.scores[DENSE]).perplexity,
        dense_single=found.single[DENSE],
        dense_multi=found.multi[DENSE],
        rows=tuple(found.row(variant) for variant in variants),
        skipped=skipped,
        caveats=caveats,
        conditions=conditions,
        seconds=perf_counter() - started,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Material:
    """What every cache reads: windows of text, each [tokens], and prompts with one and with several planted values."""

    windows: Sequence[Tensor]
    single: Sequence[NeedlePrompt]
    multi: Sequence[NeedlePrompt]

    @classmethod
    def of(cls, tokenizer: Any, text: str, settings: EvalSettings) -> Self:
        """All of it, from one text."""
        prompts = partial(
            needle_prompts,
            tokenizer,
            text,
            num_prompts=settings.num_prompts,
            num_tokens=settings.window_tokens,
            seed=settings.seed,
        )
        return cls(
            windows=spread_windows(
                tokenizer, text, num_windows=settings.num_windows, window_tokens=settings.window_tokens
            ),
            single=prompts(num_needles=1),
            multi=prompts(num_needles=settings.num_needles),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What was measured, by name of the row: the caches', and `DENSE` among ``scores``, ``single`` and ``multi``."""

    poisoned: Mapping[str, PoisonOutcome]
    scores: Mapping[str, list[TokenScores]]
    single: Mapping[str, int]
    multi: Mapping[str, int]
    drifts: Mapping[str, tuple[float, ...]]
    heads: Mapping[str, tuple[HeadErrors, ...]]
    reports: Mapping[str, list[CacheReport]]

    def row(self, variant: EvalVariant) -> EvalRow:
        """The figures of one cache."""
        name = variant.name
        reports, heads = self.reports[name], self.heads[name]
        first = reports[0]  # of one window of text
        return EvalRow(
            name=name,
            title=variant.title,
            kind=variant.kind,
            codec_bits=first.codec_bits_per_element,
            all_bits=first.bits_per_element,
            raw_elements=sum(layer.raw_elements for layer in first.layers),
            elements=first.elements,
            quality=summarize(self.scores[name]),
            recalled_single=self.single[name],
            recalled_multi=self.multi[name],
            drift=self.drifts[name],
            heads=heads,
            mean_errors=mean_errors([one.errors for one in heads]),
            materialized=sum(report.materialized for report in reports),
            poison=self.poisoned[name],
        )


def _num_steps(variants: int, settings: EvalSettings) -> int:
    """What `_measure` tells of: each variant's poison test, decoding and heads, and with dense windows and prompts."""
    own = variants * (2 + settings.num_windows)
    return own + (variants + 1) * (settings.num_windows + 2 * settings.num_prompts)


def _measure(
    model: CausalLM, variants: Sequence[EvalVariant], material: _Material, settings: EvalSettings, step: StepCounter
) -> _Found:
    through = ReadThrough(model, variants, chunk_tokens=settings.chunk_tokens, step=step)
    return _Found(
        # First, because the figures of a cache that is not read mean nothing.
        poisoned=through.poison_outcomes(material.windows[0]),
        scores=through.window_scores(material.windows),
        single=through.recalled(material.single),
        multi=through.recalled(material.multi),
        drifts=_drifts(model, variants, material.windows[0], settings, step),
        heads=_head_errors(model, variants, material.windows, settings, step),
        reports=through.reports,
    )


def _check(model: CausalLM, settings: EvalSettings) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and settings.window_tokens > limit:
        raise ContractError("window_tokens", f"at most {limit}, the model's positions", settings.window_tokens)
    decoded = settings.window_tokens - settings.drift_prompt
    if decoded < settings.drift_buckets:
        expected = f"at most {settings.window_tokens - settings.drift_buckets}, so that tokens are left to decode"
        raise ContractError("drift_prompt", expected, settings.drift_prompt)


def _drifts(
    model: CausalLM, variants: Sequence[EvalVariant], ids: Tensor, settings: EvalSettings, step: StepCounter
) -> dict[str, tuple[float, ...]]:
    """KL against dense in stretches of tokens that are fed one by one, the cache being used as in decoding."""
    dense = dense_logits(model, ids)[settings.drift_prompt :]
    prompt, rest = ids[: settings.drift_prompt], ids[settings.drift_prompt :]
    drifts = {}
    for variant in variants:
        step(f"decoding: {variant.title}")
        cache = variant.make_cache(model, read_through=False)
        with variant.attention(model):
            cached_logits(model, prompt, cache, chunk_tokens=settings.drift_prompt)
            logits = cached_logits(model, rest, cache, chunk_tokens=1)
        kl = score_tokens(dense, logits, rest).kl
        drifts[variant.name] = tuple(part.mean().item() for part in kl.tensor_split(settings.drift_buckets))
    return drifts


def _head_errors(
    model: CausalLM,
    variants: Sequence[EvalVariant],
    windows: Sequence[Tensor],
    settings: EvalSettings,
    step: StepCounter,
) -> dict[str, tuple[HeadErrors, ...]]:
    """Errors of attention on the dense model's own queries, keys and values: each layer's codec alone."""
    found: dict[str, dict[tuple[int, int], list[AttentionErrors]]] = {variant.name: {} for variant in variants}
    for ids in windows:
        seen = observe(model, ids)
        for variant in variants:
            step(f"heads: {variant.title}")
            cache = variant.make_cache(model, read_through=True)
            for one in seen:
                for head, errors in enumerate(observed_errors(one, cache, settings.num_queries)):
                    found[variant.name].setdefault((one.layer, head), []).append(errors)
    return {
        name: tuple(
            HeadErrors(layer=layer, head=head, errors=mean_errors(errors)) for (layer, head), errors in heads.items()
        )
        for name, heads in found.items()
    }


@torch.no_grad()
def observed_errors(seen: Observation, cache: Any, num_queries: int) -> tuple[AttentionErrors, ...]:
    """Errors per KV head of one layer whose keys and values go through an empty layer of a cache.

    Args:
        seen: of batch size 1, over a whole text.
        cache: made with ``read_through=True``; its layer holds the keys and values afterwards.
        num_queries: that are looked at, spread evenly.
    """
    decoded = [
        side.dense() if isinstance(side, Handle) else side for side in cache.update(seen.keys, seen.values, seen.layer)
    ]
    tokens = seen.keys.shape[2]
    positions = torch.linspace(0, tokens - 1, min(num_queries, tokens)).long()
    return attention_errors(
        seen.query[0, :, positions.to(seen.query.device)],
        (seen.keys[0], seen.values[0]),
        (decoded[0][0], decoded[1][0]),
        scale=seen.scale,
        positions=positions,
    )
