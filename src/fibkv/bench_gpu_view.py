"""Shows what `fibkv bench gpu` found: a table per head_dim, the outcomes of the checks, the notes."""

from __future__ import annotations

from rich.console import Group, RenderableType

from fibkv.bench_gpu_result import GpuResult, GpuRow
from fibkv.bench_result import ATTENTION_LIMIT, Checks
from fibkv.bench_view import MISSING, checks_table, condition_notes, digits, notes_lines, plain_table, times

HEADINGS = ("rows", "tokens", "B/elem", "call ms", "graph ms", "GB/s", "ratio")


def render_gpu(result: GpuResult) -> RenderableType:
    """The tables, the outcomes of the checks, the notes and the conditions."""
    tables = []
    for head_dim in result.settings.head_dims:
        rows = [row for row in result.rows if row.head_dim == head_dim]
        tables.append(plain_table(f"One query token, head_dim {head_dim}", HEADINGS, map(_cells, rows)))
    checks: dict[str, list[Checks]] = {}
    for row in result.rows:
        if row.checks is not None:
            checks.setdefault(row.name, []).append(row.checks)
    outcomes = {name: Checks.worst(several) for name, several in checks.items()}
    return Group(*tables, checks_table(outcomes, "output"), *notes_lines(gpu_notes(result)))


def gpu_notes(result: GpuResult) -> list[str]:
    """What has to be said under the tables."""
    used = result.settings
    launches = "; ".join(f"{kind}: {tuning}" for kind, tuning in result.tunings.found) or "not tuned"
    compiled = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result.first_calls)
    return [
        f"{result.device}; {used.query_heads} query heads, {used.kv_heads} KV heads, pages of {used.tokens_per_page} "
        f"tokens of random codes; {used.rounds} interleaved rounds, one call per contender in each.",
        "call: from the first to the last kernel of a call from Python; graph: the same call replayed as a CUDA graph. "
        "GB/s: stored bytes over the median, of the graph where there is one; the copy reads and writes half of the "
        "bf16 bytes. Ratio: to the strongest bf16 row of the same size, median of per-round ratios.",
        f"Before each call {used.flushed_bytes / 2**20:.0f} MiB are written.",
        f"Checks: relative error to float64 attention on the dequantized values, at most {ATTENTION_LIMIT:.0%}; one "
        "page is damaged in memory and restored. A row that fails has no figures.",
        "Attention in CUDA C++ where it reads the codes: " + result.cuda + ".",
        f"Launches in Triton: {launches}.",
        f"First calls, compilation included: {compiled}.",
        *condition_notes(result.conditions, result.seconds),
    ]


def _cells(row: GpuRow) -> list[str]:
    cells = [row.name, f"{row.batch}", f"{row.context}", f"{row.bytes_per_element:.3f}"]
    figures = row.figures
    if figures is None:
        return cells + [MISSING] * (len(HEADINGS) - 3)
    return [
        *cells,
        digits(1e3 * figures.called.median),
        MISSING if figures.replayed is None else digits(1e3 * figures.replayed.median),
        f"{figures.gigabytes_per_second:.1f}",
        times(figures.speedup),
    ]
