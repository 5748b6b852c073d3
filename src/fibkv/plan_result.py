"""What `fibkv plan` is asked and what it finds."""

from __future__ import annotations

from fibkv.contract import Contract, Count, Total

LEVELS = {"fp16": "raw", "q8": "int8", "fp8": "fp8", "q4": "key4/value4", "2-bit": "key2/fib2"}
"""The levels of the pressure controller, and a rung below them, with their codecs. ``raw`` keeps the model's dtype."""

MAX_BATCH = 256
"""Beyond it no batch is tried."""


class PlanSettings(Contract):
    """What is asked.

    Attributes:
        memory_nbytes: for weights and cache together.
        contexts: tokens of every row; empty: powers of two up to the model's longest, and that one.
        batches: rows.
        profiles: codecs by name, ``keys/values`` for a pair.
        tokens_per_page: tokens of a sealed page.
        weights_nbytes: bytes of the weights; None = counted.
        dtype: of weights and of what is kept raw, as torch calls it; None = the configuration's.
        implementation: of the kernels, which decides how pages are padded in memory.
    """

    memory_nbytes: Total
    contexts: tuple[Count, ...] = ()
    batches: tuple[Count, ...] = (1, 4, 16)
    profiles: tuple[str, ...] = tuple(LEVELS.values())
    tokens_per_page: Count = 64
    weights_nbytes: Total | None = None
    dtype: str | None = None
    implementation: str = "auto"


class LayerKinds(Contract):
    """Layers that are treated alike.

    Attributes:
        count: how many.
        kind: their class.
        compressed: whether fibkv keeps their pages.
        reason: why not, or how with the first codec asked for.
        nbytes: what one of them holds with it, at the smallest batch and context asked for.
    """

    count: Total
    kind: str
    compressed: bool
    reason: str
    nbytes: Total


class PlanRow(Contract):
    """One codec, batch and context.

    Attributes:
        profile: the codec.
        batch: rows.
        context: tokens of each.
        cache_nbytes: what `Cache.report` will count.
        bits_per_element: of the same, tables and slack included.
        fits: whether weights and cache fit.
        largest_context: the longest context found to fit with this batch, at most the model's longest; 0 = none.
        largest_batch: the largest batch found to fit with this context, at most `MAX_BATCH`; 0 = none.
    """

    profile: str
    batch: Count
    context: Count
    cache_nbytes: Total
    bits_per_element: float
    fits: bool
    largest_context: Total
    largest_batch: Total


class PlanResult(Contract):
    """What was found.

    Attributes:
        model: where its configuration came from.
        architecture: class of the configuration.
        settings: with nothing left open.
        weights_source: how the bytes of the weights are known.
        longest_context: of the configuration; None = it does not say.
        layers: what becomes of them.
        rows: for every codec, batch and context.
    """

    model: str
    architecture: str
    settings: PlanSettings
    weights_nbytes: Total
    weights_source: str
    longest_context: Total | None
    layers: tuple[LayerKinds, ...]
    rows: tuple[PlanRow, ...]
