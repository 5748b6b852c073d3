"""Shows what a benchmark found: its tables, the outcomes of its checks, and the conditions; 80 columns are enough."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fibkv.bench_result import (
    ATTENTION_LIMIT,
    LOGITS_LIMIT,
    CacheRow,
    Checks,
    KernelResult,
    KernelRow,
    PrefillResult,
    StepResult,
)
from fibkv.bench_settings import PrefillSettings
from fibkv.demo_view import verdict
from fibkv.machine import Conditions
from fibkv.timing import Timing

MISSING = "-"


def render_kernels(result: KernelResult) -> RenderableType:
    """A table per context, the outcomes of the checks, the notes and the conditions."""
    tables, queries = [], result.settings.queries
    asked = "One query token" if queries == 1 else f"{queries} query tokens"
    for context in result.settings.contexts:
        rows = [row for row in result.rows if row.context == context]
        tables.append(plain_table(f"{asked}, {context} cached tokens", _KERNEL_HEADINGS, map(_kernel_cells, rows)))
    checks: dict[str, list[Checks]] = {}
    for row in result.rows:
        checks.setdefault(row.name, []).append(row.checks)
    outcomes = {name: Checks.worst(several) for name, several in checks.items()}
    return Group(*tables, checks_table(outcomes, "output"), *notes_lines(kernel_notes(result)))


def render_models(result: StepResult | PrefillResult) -> RenderableType:
    """The table of the caches, the outcomes of the checks, the notes and the conditions."""
    title, timed = f"{result.settings.context} tokens", ("p10", "p90", "tok/s")
    if isinstance(result, StepResult):
        title, headings, cells = f"Decode steps, {title}", ("ms/token", *timed, "ratio"), _ratio_cells
    elif result.settings.cached:
        title = f"Prefill, {title} behind {result.settings.cached} cached ones"
        headings, cells = ("ms/prompt", *timed, "ratio"), _ratio_cells
    else:
        title, headings, cells = f"Prefill, {title}", ("ms/prompt", *timed, "overhead"), _overhead_cells
    table = plain_table(title, ("MiB", "of dense", *headings), map(cells, result.rows))
    outcomes = {row.name: row.checks for row in result.rows if row.checks is not None}
    return Group(table, checks_table(outcomes, "logits"), *notes_lines(model_notes(result)))


def kernel_notes(result: KernelResult) -> list[str]:
    """What has to be said under the tables of `fibkv bench kernels`."""
    used = result.settings
    methods = ", ".join(dict.fromkeys(method for _, method in result.read_methods))
    return [
        f"{used.query_heads} query heads, {used.kv_heads} KV heads, head_dim {used.head_dim}, batch {used.batch}; "
        f"random normal vectors; {used.rounds} interleaved rounds, one call per contender in each.",
        "B/elem: every stored byte (codes, norms, scales, raw sinks and tail with slack, page metadata) over the "
        "elements of keys and values; codebooks and rotations, which all layers share, are not in it.",
        "ns: median per token and KV head, keys and values. GB/s: stored bytes over the median. "
        "Ratio: how many times as fast as the strongest bf16 row of the same context, median of per-round ratios.",
        f"Read: time of a pure read of as many bytes in the same rounds ({methods}) over the contender's; "
        "100 % is the speed of memory.",
        f"Cold: before an operand comes up again, {_mib(result.cache_bytes)} are read, "
        f"{_cache_size(result.conditions)}.",
        "Layouts that an implementation makes at the first sight of a page are made before the timing.",
        f"Checks: relative error to float64 attention on the dequantized values, over all calls, at most "
        f"{ATTENTION_LIMIT:.0%}; some keys are damaged in memory and restored. A row that fails has no figures.",
        *condition_notes(result.conditions, result.seconds),
    ]


def model_notes(result: StepResult | PrefillResult) -> list[str]:
    """What has to be said under the tables of `fibkv bench steps` and `fibkv bench prefill`."""
    used = result.settings
    notes = [
        f"Llama of random weights, bfloat16: {used.layers} layers, hidden size {used.hidden_size}, "
        f"{used.query_heads} query heads, {used.kv_heads} KV heads, head_dim {used.head_dim}, batch 1. "
        f"Kernels under fibkv's caches: {used.implementation}.",
        "MiB: bytes counted after the run; for stock caches those of all their tensors. "
        "tok/s: over the mean, so that rare slow steps (sealing a page, re-quantizing) count.",
    ]
    if isinstance(result, StepResult):
        notes += [
            f"Every cache was given the same random keys and values; {used.rounds} interleaved rounds of "
            f"{result.settings.tokens} tokens each by generate, the first token of a round not counted; "
            f"before each step {_mib(result.cache_bytes)} of other memory are read, {_cache_size(result.conditions)}.",
            "Ratio: how many times as fast as the strongest row of transformers' caches, median of per-round ratios. "
            "Its quantized caches decode all they hold at every step; they are given the matmul attention.",
        ]
    else:
        notes.append(_prefill_note(result.settings))
    notes.append(
        f"Checks: relative error of the next logits to dense attention on the same values, at most {LOGITS_LIMIT:.0%}; "
        "damaged keys must move the logits; dense copies made instead of reading pages must be 0. "
        "Quantized stock caches are taken as they are."
    )
    notes += [f"Skipped: {name}: {reason}." for name, reason in result.skipped]
    return [*notes, *condition_notes(result.conditions, result.seconds)]


def _prefill_note(used: PrefillSettings) -> str:
    if used.cached:
        return (
            f"Every cache was given the same random keys and values; {used.rounds} interleaved rounds, one pass of the "
            "whole prompt behind a copy of it in each. Ratio: how many times as fast as the dense row, median of "
            "per-round ratios. Transformers' quantized caches decode all they hold."
        )
    return (
        f"{used.rounds} interleaved rounds, a new cache and one pass of the whole prompt in each. "
        "Overhead: time added to the dense row's, median of per-round ratios."
    )


_KERNEL_HEADINGS = ("B/elem", "ms", "p10", "p90", "ns", "GB/s", "ratio", "read")


def _kernel_cells(row: KernelRow) -> list[str]:
    figures = row.figures
    cells = [row.name, f"{row.bytes_per_element:.3f}"]
    if figures is None:
        return cells + [MISSING] * (len(_KERNEL_HEADINGS) - 1)
    return [
        *cells,
        *_milliseconds(figures.timing),
        digits(figures.ns_per_token),
        f"{figures.gigabytes_per_second:.1f}",
        times(figures.speedup),
        f"{figures.of_read:.0%}",
    ]


def _ratio_cells(row: CacheRow) -> list[str]:
    return _cache_cells(row, MISSING if row.figures is None else times(row.figures.speedup))


def _overhead_cells(row: CacheRow) -> list[str]:
    overhead = None if row.figures is None else row.figures.overhead
    return _cache_cells(row, MISSING if overhead is None else f"{overhead:+.1%}")


def _cache_cells(row: CacheRow, compared: str) -> list[str]:
    figures = row.figures
    cells = [row.name, f"{row.nbytes / 2**20:.1f}", f"{row.of_dense:.3f}"]
    if figures is None:
        return cells + [MISSING] * 5
    return [*cells, *_milliseconds(figures.timing), digits(figures.tokens_per_second), compared]


def _milliseconds(timing: Timing) -> list[str]:
    return [digits(1e3 * seconds) for seconds in (timing.median, timing.p10, timing.p90)]


def digits(number: float) -> str:
    """Three significant digits, or all digits before the point."""
    return f"{number:.0f}" if number >= 100 else f"{number:#.3g}"


def times(speedup: float | None) -> str:
    """A ratio, or what stands for one that is missing."""
    return MISSING if speedup is None else f"{speedup:.2f}x"


def plain_table(title: str, headings: Sequence[str], rows: Iterator[list[str]]) -> Table:
    """A table whose first column has no heading."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for cells in rows:
        table.add_row(*cells)
    return table


def checks_table(outcomes: Mapping[str, Checks], output: str) -> Table:
    """The outcomes of checks by contender; ``output`` is what damage to a page moves."""
    table = Table("checked", "error", "poison test", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, checks in outcomes.items():
        too_large = "" if checks.error <= checks.limit else "FAILED: "
        copies = f"; FAILED: {checks.materialized} dense copies" if checks.materialized else ""
        table.add_row(name, f"{too_large}{checks.error:.2%}", verdict(checks.poison, output) + copies)
    return table


def notes_lines(lines: Sequence[str]) -> list[Text]:
    """Notes as they stand under tables."""
    return [Text(f"· {line}", style="dim") for line in lines]


def condition_notes(conditions: Conditions, seconds: float) -> list[str]:
    """What has to be said of the machine and the run."""
    packages = ", ".join(f"{name} {version}" for name, version in conditions.packages)
    states = ", ".join(f"{name}: {state}" for name, state in conditions.kernels)
    load = "unknown" if conditions.load_average is None else " ".join(f"{load:.2f}" for load in conditions.load_average)
    return [
        f"{conditions.cpu}, cores: {conditions.cores}, threads: {conditions.threads}, torch on "
        f"{conditions.instruction_set}; kernels {states}; {packages}.",
        f"Started {conditions.started}, load average {load}, free memory {_mib(conditions.available_memory)}; "
        f"the run took {seconds:.0f} s.",
        f"Command: {conditions.command}",
    ]


def _cache_size(conditions: Conditions) -> str:
    size = conditions.last_level_cache
    return "the last-level cache's size being unknown" if size is None else f"the last-level cache has {_mib(size)}"


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.0f} MiB"
