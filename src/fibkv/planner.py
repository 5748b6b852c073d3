"""Which contexts, batches and codecs fit into a memory, from a model's configuration alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import groupby
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig

from fibkv.embedded import DTYPES
from fibkv.errors import ContractError, ModelError
from fibkv.hf import Cache
from fibkv.hf_forecast import CacheForecast, ShapeProbe
from fibkv.plan_result import MAX_BATCH, LayerKinds, PlanResult, PlanRow, PlanSettings
from fibkv.report import CacheReport

# What is tried where a configuration names no longest context.
_UNBOUNDED = 2**20
_INDEX = "model.safetensors.index.json"


def plan_memory(model: Path, settings: PlanSettings) -> PlanResult:
    """What fits.

    Caches are counted as `Cache.report` counts them after one prompt of the context's length. Not counted: what a
    forward pass needs beside weights and cache, and blocks taken ahead while tokens are generated (at most one for
    every 32 in use).

    Args:
        model: a configuration of transformers (JSON), or a directory with one.
        settings: what is asked.

    Raises:
        ModelError: no configuration, or of a model that cannot be served.
        ContractError: an unknown codec or dtype.
    """
    config = _load_config(model)
    probe = ShapeProbe(config, _dtype(settings.dtype))
    weights, source = _weights(model, settings, probe)
    text = config.get_text_config(decoder=True)
    longest = getattr(text, "max_position_embeddings", None)
    contexts = settings.contexts or _contexts(longest)
    room = settings.memory_nbytes - weights
    rows: list[PlanRow] = []
    kinds: tuple[LayerKinds, ...] = ()
    for profile in settings.profiles:
        report = cache(_forecast(config, probe, settings, profile).report)
        kinds = kinds or tuple(_kinds(report(min(settings.batches), min(contexts))))
        rows += _rows(report, profile, settings.batches, contexts, room, longest or _UNBOUNDED)
    return PlanResult(
        model=str(model),
        architecture=type(config).__name__,
        settings=settings.model_copy(update={"contexts": contexts}),
        weights_nbytes=weights,
        weights_source=source,
        longest_context=longest,
        layers=kinds,
        rows=tuple(rows),
    )


def _rows(
    report: Callable[[int, int], CacheReport],
    profile: str,
    batches: tuple[int, ...],
    contexts: tuple[int, ...],
    room: int,
    longest: int,
) -> Iterator[PlanRow]:
    def fits(batch: int, context: int) -> bool:
        return report(batch, context).nbytes <= room

    by_batch = {batch: _largest(longest, partial(fits, batch)) for batch in batches}
    by_context = {context: _largest(MAX_BATCH, partial(_flipped, fits, context)) for context in contexts}
    for batch in batches:
        for context in contexts:
            counted = report(batch, context)
            yield PlanRow(
                profile=profile,
                batch=batch,
                context=context,
                cache_nbytes=counted.nbytes,
                bits_per_element=counted.bits_per_element,
                fits=fits(batch, context),
                largest_context=by_batch[batch],
                largest_batch=by_context[context],
            )


def _flipped(fits: Callable[[int, int], bool], context: int, batch: int) -> bool:
    return fits(batch, context)


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to a limit that fits, by bisection: itself seen to fit; 0 if 1 does not."""
    if fits(limit):
        return limit
    known, open_ = 0, limit
    while open_ - known > 1:
        middle = (known + open_) // 2
        known, open_ = (middle, open_) if fits(middle) else (known, middle)
    return known


def _forecast(config: PretrainedConfig, probe: ShapeProbe, settings: PlanSettings, profile: str) -> CacheForecast:
    keys, _, values = profile.partition("/")
    empty = Cache(
        config,
        profile=(keys, values or keys),
        tokens_per_page=settings.tokens_per_page,
        implementation=settings.implementation,
    )
    return CacheForecast(empty, probe)


def _kinds(report: CacheReport) -> Iterator[LayerKinds]:
    alike = sorted(report.layers, key=lambda layer: (not layer.compressed, layer.kind, layer.reason, layer.nbytes))
    for _, group in groupby(alike, key=lambda layer: (layer.kind, layer.reason, layer.nbytes)):
        first, *rest = group
        yield LayerKinds(
            count=1 + len(rest),
            kind=first.kind,
            compressed=first.compressed,
            reason=first.reason,
            nbytes=first.nbytes,
        )


def _contexts(longest: int | None) -> tuple[int, ...]:
    steps = [4096, 32768, 131072]
    return tuple(steps) if longest is None else (*(step for step in steps if step < longest), longest)


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    if name not in DTYPES or name == "auto":
        raise ContractError("PlanSettings.dtype", "float32, bfloat16 or float16", name)
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _load_config(model: Path) -> PretrainedConfig:
    found = model / "config.json" if model.is_dir() else model
    if not found.is_file():
        raise ModelError(f"{model}: expected a configuration of transformers, or a directory with config.json")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(str(found))
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"{found}: not a configuration of transformers: {str(error).splitlines()[0]}") from error
    return config


def _weights(model: Path, settings: PlanSettings, probe: ShapeProbe) -> tuple[int, str]:
    """The bytes of the weights, and how they are known."""
    if settings.weights_nbytes is not None:
        return settings.weights_nbytes, "as given"
    # A dtype that was asked for is not that of the files.
    stored = _stored(model) if model.is_dir() and settings.dtype is None else None
    return stored or (probe.weights_nbytes, "counted from the configuration")


def _stored(directory: Path) -> tuple[int, str] | None:
    index = directory / _INDEX
    if index.is_file():
        try:
            return int(json.loads(index.read_text(encoding="utf-8"))["metadata"]["total_size"]), f"as {_INDEX} says"
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{index}: expected metadata.total_size, a number of bytes") from error
    found = sorted(directory.glob("*.safetensors"))
    return (sum(path.stat().st_size for path in found), "size of the safetensors files") if found else None
