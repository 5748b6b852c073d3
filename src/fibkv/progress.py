"""Progress of long computations: a callback, and the bar that shows it on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Called now and then while something runs: ``done`` steps of ``total``, and what is going on."""

    def __call__(self, done: int, total: int, note: str) -> None:
        """Takes note of the progress; must return quickly."""


ProgressCallback = Callable[[str, int, int], None]
"""Called before each step with what comes next, the steps done, and the steps in all."""


class StepCounter:
    """Counts the steps of a run for a `ProgressCallback`: called with what comes next before each step."""

    def __init__(self, progress: ProgressCallback, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def __call__(self, label: str) -> None:
        """Says what comes next, and counts it."""
        self._progress(label, self._done, self._total)
        self._done += 1


def silent(done: int, total: int, note: str) -> None:
    """The progress that nobody watches."""


@contextmanager
def terminal_progress(description: str) -> Iterator[Progress]:
    """A progress bar on stderr while the context lasts; silent where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield silent
        return
    # As long to import as a small prefix to restore; most processes never show a bar.
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn  # noqa: PLC0415
    from rich.progress import Progress as Bar  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, note="")
        yield lambda done, total, note: bar.update(task, completed=done, total=total, note=note)
