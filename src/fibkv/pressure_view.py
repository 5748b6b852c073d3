"""Shows a run under memory pressure: live on a terminal, its outcome as a table, its course as a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fibkv.demo_view import verdict
from fibkv.ladder import RUNGS
from fibkv.plot import new_figure
from fibkv.pool_stats import PoolStats
from fibkv.pressure_result import PressureResult, PressureSettings, Tick
from fibkv.sizes import format_size

COLORS = {"fp16": "red", "q8": "yellow", "fp8": "yellow", "q4": "green", "q2": "blue", "other": "white"}
BAR_WIDTH = 64


@contextmanager
def live_view(console: Console, settings: PressureSettings) -> Iterator[Callable[[Tick], None]]:
    """Draws each tick on the console while the context lasts; what it yields is the ``on_tick`` of a run."""
    with Live(console=console, transient=True, auto_refresh=False) as live:
        yield lambda tick: live.update(render_tick(tick, settings), refresh=True)


def parts(stats: PoolStats) -> dict[str, int]:
    """Bytes by rung, and what is not in pages on the ladder: tails, page tables, tables, slack."""
    found: dict[str, int] = {}
    for rung in RUNGS:
        found[rung] = sum(row.nbytes for row in stats.rungs if row.rung == rung)
    found["other"] = max(0, stats.allocated - sum(found.values()))
    return found


def render_tick(tick: Tick, settings: PressureSettings) -> RenderableType:
    """One moment: the budget as a bar of rungs, the pressure, the level, and one sign per sequence."""
    stats = tick.pool
    budget = stats.budget or 1
    held = parts(stats)
    bar = Text("  ")
    for name, nbytes in held.items():
        bar.append("█" * round(BAR_WIDTH * nbytes / budget), style=COLORS[name])
    bar.append("·" * max(0, BAR_WIDTH + 2 - len(bar)), style="dim")
    legend = Text("  ")
    for name, nbytes in held.items():
        if nbytes:
            legend.append(f"■ {name} {format_size(nbytes)}  ", style=COLORS[name])
    to_come = settings.sequences - tick.live - tick.waiting - tick.finished - tick.refused
    signs = Text("  ")
    for count, sign, style in (
        (tick.finished, "●", "green"),
        (tick.refused, "✗", "red"),
        (tick.live, "▶", "cyan"),
        (tick.waiting, "◌", "yellow"),
        (to_come, "·", "dim"),
    ):
        signs.append(sign * count, style=style)
    state = stats.pressure
    return Group(
        Text(
            f"tick {tick.tick}: {format_size(stats.allocated)} of {format_size(budget)} "
            f"({stats.allocated / budget:.1%}), peak {stats.peak / budget:.1%}"
        ),
        bar,
        legend,
        Text(
            f"  level {state.level if state else '-'}, pressure {state.pressure if state else 0:.3f}, "
            f"{stats.recoded_pages} pages re-encoded, {stats.refusals} steps refused"
        ),
        signs,
        Text(f"  ● {tick.finished} finished  ✗ {tick.refused} refused  ▶ {tick.live} live  ◌ {tick.waiting} waiting"),
    )


def render(result: PressureResult) -> RenderableType:
    """The outcome of a run, and what has to be said of it; 80 columns are enough."""
    table = Table(
        title=f"fibkv demo --pressure: {result.model}", title_justify="left", box=SIMPLE_HEAD, show_header=False
    )
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in _rows(result):
        table.add_row(name, value)
    return Group(table, *(Text(f"· {note}", style="dim") for note in notes(result)))


def _rows(result: PressureResult) -> Iterator[tuple[str, str]]:
    used, last = result.settings, result.ticks[-1].pool
    yield "sequences", f"{result.finished} of {used.sequences} finished, {used.sequences - result.finished} refused"
    most = max(tick.live for tick in result.ticks)
    yield "at once", f"{most} live; the budget fits {used.fits} at 16 bits"
    yield "budget", f"{format_size(result.budget)}, peak {format_size(result.peak)} ({result.peak / result.budget:.2%})"
    before, most_process = result.ticks[0].process_nbytes, max(tick.process_nbytes for tick in result.ticks)
    yield "process", f"grew by {format_size(max(1, most_process - before))}, the model's working memory included"
    levels = [tick.pool.pressure.level for tick in result.ticks if tick.pool.pressure is not None]
    state = last.pressure
    changes = 0 if state is None else state.upgrades + state.downgrades
    yield "levels", f"{', '.join(dict.fromkeys(levels))}; {changes} changes"
    yield (
        "re-encoded",
        (
            f"{last.recoded_pages} pages in {last.recoding_seconds:.2f} s of {result.seconds:.0f} s; longest share of "
            f"a step {1e3 * last.longest_step_seconds:.1f} ms, median step {1e3 * result.step_seconds:.1f} ms"
        ),
    )
    yield "steps refused", f"{last.refusals}, and tried again later" if used.waits else str(last.refusals)
    if result.poison is not None:
        yield "poison test", verdict(result.poison)
    top1s = [row.top1 for row in result.sequences if row.top1 is not None]
    if top1s:
        yield "against dense", f"KL {result.kl:.4f}, top-1 {sum(top1s) / len(top1s):.1%}, over the finished sequences"


def notes(result: PressureResult) -> list[str]:
    """What has to be said under the table."""
    used = result.settings
    return [
        f"Each sequence reads a prompt of {used.prompt_tokens} tokens and then takes {used.new_tokens} tokens of the "
        f"same held-out text one by one, {used.arrivals:g} arrivals per tick, one token per live sequence and tick.",
        f"Budget: {used.fits} x {used.tokens} tokens at 16 bits. Bytes are every byte of pages, metadata, page tables, "
        "raw tails with their unused room, tables and slack, as allocated.",
        "KL is KL(dense || pool) per new token in nats, against one dense pass over the same tokens.",
        f"Dense copies made instead of attending to pages: {sum(row.materialized for row in result.sequences)}.",
    ]


def save_plot(result: PressureResult, path: Path) -> None:
    """Write a plot of bytes by rung, pressure and sequences over ticks.

    Raises:
        FibkvError: matplotlib is not installed.
    """
    figure = new_figure(8, 7)
    upper, middle, lower = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1.5, 1.5))
    ticks = [tick.tick for tick in result.ticks]
    held = [parts(tick.pool) for tick in result.ticks]
    names = [name for name in COLORS if any(part[name] for part in held)]
    colors = [f"tab:{'gray' if COLORS[name] == 'white' else COLORS[name].replace('yellow', 'olive')}" for name in names]
    upper.stackplot(ticks, [[part[name] / 2**20 for part in held] for name in names], labels=names, colors=colors)
    upper.axhline(result.budget / 2**20, color="black", linestyle="--", label="budget")
    upper.set(
        ylabel="MiB", title=f"{result.model}: {result.settings.sequences} sequences, room for {result.settings.fits}"
    )
    upper.legend(loc="upper right", ncols=2)
    states = [tick.pool.pressure for tick in result.ticks]
    middle.plot(ticks, [0.0 if state is None else state.pressure for state in states], label="pressure")
    middle.set(ylabel="pressure", ylim=(0, 1.05))
    levels = middle.twinx()
    levels.step(ticks, ["fp16" if state is None else state.level for state in states], color="tab:red", where="post")
    levels.set(ylabel="level of new pages")
    for name in ("live", "waiting", "finished", "refused"):
        lower.plot(ticks, [getattr(tick, name) for tick in result.ticks], label=name)
    lower.set(xlabel="tick", ylabel="sequences")
    lower.legend(loc="center right")
    figure.savefig(path)
