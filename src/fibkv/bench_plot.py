"""Plots of what a benchmark found, for matplotlib, which is an optional extra."""

from __future__ import annotations

from pathlib import Path

from fibkv.bench_result import KernelResult, PrefillResult, StepResult
from fibkv.plot import new_figure

# Of baselines: what is compressed has the colours.
_GRAYS = ("0.2", "0.35", "0.5", "0.65")


def plot_kernels(result: KernelResult, path: Path) -> None:
    """Time per step over cached tokens, both logarithmic; dashed: a pure read of the bytes that the row stores.

    Args:
        result: of a run.
        path: file to write; its suffix says the format.

    Raises:
        FibkvError: matplotlib is not installed.
    """
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    drawn: set[int] = set()
    kinds = {row.name: row.kind for row in result.rows}
    for index, (name, kind) in enumerate(sorted(kinds.items(), key=lambda item: item[1] == "baseline")):
        timed = [(row, row.figures) for row in result.rows if row.name == name and row.figures is not None]
        color, marker = (_GRAYS[index % len(_GRAYS)], "s:") if kind == "baseline" else (f"C{index % 10}", "o-")
        contexts = [row.context for row, _ in timed]
        axes.plot(contexts, [1e3 * figures.timing.median for _, figures in timed], marker, color=color, label=name)
        # Rows of one form share its read.
        if not drawn & {row.nbytes for row, _ in timed}:
            axes.plot(contexts, [1e3 * figures.read.median for _, figures in timed], "--", color=color, alpha=0.6)
        drawn |= {row.nbytes for row, _ in timed}
    axes.plot([], [], "--", color="gray", label="pure read of as many bytes")
    axes.set(xscale="log", yscale="log", xlabel="cached tokens", ylabel="ms per step and layer, median")
    axes.set_title(f"{result.conditions.cpu}, threads: {result.conditions.threads}")
    axes.set_xticks(result.settings.contexts, [str(context) for context in result.settings.contexts])
    axes.set_xticks([], minor=True)
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(path)


def plot_models(result: StepResult | PrefillResult, path: Path) -> None:
    """Median time per cache, from the 10th to the 90th percentile.

    Args:
        result: of a run.
        path: file to write; its suffix says the format.

    Raises:
        FibkvError: matplotlib is not installed.
    """
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    for row in reversed(result.rows):
        if row.figures is not None:
            timing = row.figures.timing
            spread = [[1e3 * (timing.median - timing.p10)], [1e3 * (timing.p90 - timing.median)]]
            color = "tab:blue" if row.kind == "fibkv" else "tab:gray"
            axes.barh(row.name, 1e3 * timing.median, xerr=spread, color=color, capsize=3)
    call = "token" if isinstance(result, StepResult) else "prompt"
    axes.set(xlabel=f"ms per {call}: median, 10th to 90th percentile")
    axes.set_title(f"{result.settings.context} tokens, {result.conditions.cpu}, threads: {result.conditions.threads}")
    figure.savefig(path)
