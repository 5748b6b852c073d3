"""Shows a demonstration: its table and notes on a console, its progress, and a plot in a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fibkv.demo_result import DemoResult, VariantRow
from fibkv.plot import new_figure
from fibkv.progress import ProgressCallback
from fibkv.quality_result import PoisonOutcome


def render(result: DemoResult) -> RenderableType:
    """The figures of a run, the outcomes of its poison tests, and the notes; 80 columns are enough."""
    return Group(_figures(result), _poison_tests(result), *(Text(f"· {note}", style="dim") for note in notes(result)))


def notes(result: DemoResult) -> list[str]:
    """What has to be said under the table: how each column was taken, and under which conditions."""
    used = result.settings
    start = "each window starts with a BOS token" if result.bos else "no BOS token"
    dense_copies = sum(row.materialized for row in result.variants)
    return [
        f"Text: {used.num_windows} windows of {used.window_tokens} tokens, spread evenly over the text ({start}); "
        "PPL is perplexity; KL is KL(dense || row) per predicted token in nats, in float64.",
        f"Read-through: tokens are fed in chunks of {used.chunk_tokens}, each is sealed before attention sees it, "
        "so every key and value that attention reads went through the codec, the token's own included. No sinks and "
        "no tail are kept raw. Dense is one plain forward pass.",
        f"Bits per element and KiB: every byte held for {used.window_tokens} tokens (codes, norms, scales, tables, "
        f"slack), over the elements of keys and values; dense holds the model's {result.dtype}.",
        f"Needles: {used.num_prompts} prompts of {used.window_tokens} tokens, {result.needles_planted} values in all, "
        "read-through and teacher-forced; a value counts if each of its tokens is the arg max. Dense is the yardstick.",
        f"Tokens/s: greedy decoding of {used.new_tokens} tokens after {used.window_tokens}, batch 1, median of "
        f"{used.rounds} interleaved rounds, {result.device}. Caches with their default policy (sinks and newest raw); "
        "dense is transformers' default attention.",
        "Poison test: the key codes of one page are damaged in memory, the next token's logits must move, and be "
        "exactly equal once it is restored.",
        f"Dense copies made instead of attending to pages: {dense_copies}.",
        f"Model: {result.model}, {result.num_parameters / 1e6:.1f} M parameters, {result.dtype}. "
        f"The run took {result.seconds:.0f} s.",
        *result.caveats,
    ]


def _figures(result: DemoResult) -> Table:
    table = Table(title=f"fibkv demo: {result.model}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("cache")
    for heading in ("bits", "KiB", "PPL", "KL mean", "KL p99", "top-1", "needles", "tok/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    dense = result.dense
    table.add_row(
        "dense",
        f"{dense.bits_per_element:.2f}",
        f"{dense.nbytes / 1024:.0f}",
        f"{dense.perplexity:.3f}",
        "-",
        "-",
        "-",
        _share(dense.recalled, result),
        f"{dense.tokens_per_second:.0f}",
    )
    for row in result.variants:
        table.add_row(*_cells(row, result))
    return table


def _cells(row: VariantRow, result: DemoResult) -> list[str]:
    return [
        row.title,
        f"{row.bits_per_element:.2f}",
        f"{row.nbytes / 1024:.0f}",
        f"{row.quality.perplexity:.3f}",
        f"{row.quality.kl_mean:.5f}",
        f"{row.quality.kl_p99:.4f}",
        f"{row.quality.top1:.1%}",
        _share(row.recalled, result),
        f"{row.tokens_per_second:.0f}",
    ]


def _poison_tests(result: DemoResult) -> Table:
    table = Table("cache", "poison test", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in result.variants:
        table.add_row(row.title, verdict(row.poison))
    return table


def _share(recalled: int, result: DemoResult) -> str:
    return f"{recalled / result.needles_planted:.1%}"


def verdict(outcome: PoisonOutcome, output: str = "logits") -> str:
    """The outcome of a poison test in words; ``output`` says what was looked at."""
    moved = f"{output} moved by {outcome.moved:.3g}" if outcome.moved > 0 else f"FAILED: {output} did not move"
    restored = "restored exactly" if outcome.restored else "FAILED: not restored"
    return f"{moved}; {restored}"


@contextmanager
def progress_bar(console: Console, *, ticking: bool = True) -> Iterator[ProgressCallback]:
    """A bar on the console while the context lasts; what it yields is the ``progress`` of a run.

    Args:
        console: to draw on.
        ticking: whether the clock goes on between steps. That takes a thread, which has no place beside timings.
    """
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, auto_refresh=ticking) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda label, done, total: bar.update(
            task, description=label, completed=done, total=total, refresh=not ticking
        )


def save_plot(result: DemoResult, path: Path) -> None:
    """Write a plot of mean KL over counted bits per element, one point per compressed cache.

    Args:
        result: of a run.
        path: file to write; its suffix says the format.

    Raises:
        FibkvError: matplotlib is not installed.
    """
    figure = new_figure(6, 4)
    axes = figure.add_subplot()
    for row in result.variants:
        point = (row.bits_per_element, row.quality.kl_mean)
        axes.plot(*point, "o", color="tab:blue")
        axes.annotate(row.title, point, xytext=(0, 6), textcoords="offset points", ha="center")
    axes.margins(0.15)
    axes.set(yscale="log", xlabel="counted bits per element", ylabel="mean KL(dense || row), nats")
    axes.set_title(f"{result.model}, read-through")
    figure.savefig(path)
