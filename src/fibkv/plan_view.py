"""Shows what fits: the layers, the longest contexts, the largest batches, and the bytes between; 80 columns do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fibkv.plan_result import LEVELS, MAX_BATCH, PlanResult, PlanRow
from fibkv.sizes import format_size


def render_plan(result: PlanResult) -> RenderableType:
    """The tables, and what is counted in them."""
    settings = result.settings
    by_key = {(row.profile, row.batch, row.context): row for row in result.rows}
    batches, contexts = settings.batches, settings.contexts

    def table(title: str, heading: str, columns: Sequence[int], cell: Callable[[str, int], str]) -> Table:
        shown = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
        for name in ("level", "codec"):
            shown.add_column(name)
        for column in columns:
            shown.add_column(f"{heading} {column}", justify="right")
        for profile in settings.profiles:
            shown.add_row(_level(profile), profile, *(cell(profile, column) for column in columns))
        return shown

    return Group(
        Text(_summary(result)),
        table(
            "Longest context that fits",
            "batch",
            batches,
            lambda profile, batch: _context(by_key[profile, batch, contexts[0]], result.longest_context),
        ),
        table(
            "Largest batch that fits",
            "context",
            contexts,
            lambda profile, context: _batch(by_key[profile, batches[0], context]),
        ),
        *(
            table(
                f"Cache at batch {batch}",
                "context",
                contexts,
                partial(_cell, by_key, batch),
            )
            for batch in batches
        ),
        Text(
            "* the model's longest context, + the largest batch that is tried, - none, ! does not fit.\n"
            "Counted: what Cache.report() counts after one prompt (codes, norms, metadata, raw regions, windows, "
            "states, tables, padding, slack), and the weights. Not counted: what a forward pass needs beside them."
        ),
    )


def _cell(rows: Mapping[tuple[str, int, int], PlanRow], batch: int, profile: str, context: int) -> str:
    row = rows[profile, batch, context]
    return format_size(row.cache_nbytes) + ("" if row.fits else " !")


def _summary(result: PlanResult) -> str:
    settings = result.settings
    longest = "not said" if result.longest_context is None else f"{result.longest_context} tokens"
    lines = [
        f"{result.model}: {result.architecture}, longest context {longest}",
        f"memory {format_size(settings.memory_nbytes)}, weights {format_size(result.weights_nbytes)} "
        f"({result.weights_source})",
    ]
    lines += [
        f"  {layers.count} x {layers.kind}: {'compressed' if layers.compressed else 'as it is'} ({layers.reason}), "
        f"{format_size(layers.nbytes)} each at batch {min(settings.batches)}, context {min(settings.contexts)}"
        for layers in result.layers
    ]
    return "\n".join(lines) + "\n"


def _level(profile: str) -> str:
    return next((level for level, codec in LEVELS.items() if codec == profile), "")


def _context(row: PlanRow, longest: int | None) -> str:
    return "-" if not row.largest_context else f"{row.largest_context}{'*' if row.largest_context == longest else ''}"


def _batch(row: PlanRow) -> str:
    return "-" if not row.largest_batch else f"{row.largest_batch}{'+' if row.largest_batch == MAX_BATCH else ''}"
