"""`fibkv bench kernels`: attention of one layer on compressed pages, against torch on dense bfloat16.

What keeps it honest: every output, also of the timed calls, is held to float64 attention on the dequantized values;
damage to a page must change it; every call finds its operands in memory and not in a cache; contenders take turns;
ratios are taken within a round, to the strongest baseline of this run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fibkv import kernels
from fibkv.bench_contenders import BASELINES, Contender, baseline, exact, paged
from fibkv.bench_forms import DenseForm, Form, PagedForm
from fibkv.bench_read import PureRead, cold_nbytes
from fibkv.bench_result import ATTENTION_LIMIT, Checks, KernelFigures, KernelResult, KernelRow
from fibkv.bench_settings import KernelSettings
from fibkv.errors import KernelError
from fibkv.machine import Conditions
from fibkv.metrics import relative_error
from fibkv.progress import ProgressCallback, StepCounter
from fibkv.quality import poison_outcome
from fibkv.threads import torch_threads
from fibkv.timing import Rounds, Timing, interleave, ratio, strongest


def run_kernels(settings: KernelSettings, progress: ProgressCallback) -> KernelResult:
    """Measures every contender at every context.

    Args:
        settings: what to measure.
        progress: told before each step.

    Raises:
        KernelError: an implementation that is not available.
        ContractError: a profile that does not fit the head_dim.
    """
    started = perf_counter()
    num_threads = settings.num_threads or torch.get_num_threads()
    implementations = chosen_implementations(settings.implementations)
    conditions = Conditions.now(num_threads)
    # One operand per profile and implementation, the dense one, and the buffer of the pure read.
    cache_bytes = cold_nbytes(settings.cache_bytes, len(settings.profiles) * len(implementations) + 2)
    per_context = len(BASELINES) + 2 * len(settings.profiles) * len(implementations) + 1 + settings.rounds
    step = StepCounter(progress, len(settings.contexts) * per_context)
    rows: list[KernelRow] = []
    with torch_threads(num_threads), torch.inference_mode():
        dense_nbytes = 4 * settings.batch * settings.kv_heads * settings.head_dim * max(settings.contexts)
        read = PureRead(max(cache_bytes, dense_nbytes))
        for context in settings.contexts:
            rows += _Trials(settings, context, implementations, read, step).rows(cache_bytes)
    return KernelResult(
        settings=settings,
        conditions=conditions,
        cache_bytes=cache_bytes,
        read_methods=tuple((nbytes, read.method(nbytes)) for nbytes in sorted({row.nbytes for row in rows})),
        rows=tuple(rows),
        seconds=perf_counter() - started,
    )


def chosen_implementations(names: Sequence[str]) -> tuple[str, ...]:
    """Implementation names with "auto" replaced by what it stands for.

    Raises:
        KernelError: an implementation that does not exist or is not available, and why.
    """
    states = kernels.available()
    automatic = next(name for name, state in states.items() if state == "yes")
    chosen = tuple(dict.fromkeys(automatic if name == "auto" else name for name in names))
    for name in chosen:
        if states.get(name) != "yes":
            known = ", ".join(f"{known}: {state}" for known, state in states.items())
            raise KernelError(f"kernel implementation: expected one of {known}; got {name!r}")
    return chosen


@dataclass(slots=True, eq=False)
class _Trial:
    """One contender, what it has to give, and the largest error of what it gave so far."""

    contender: Contender[Any]
    query: Tensor
    expected: Tensor
    error: float = 0.0

    def checks(self) -> Checks:
        """Attends to the original: intact, damaged, restored."""
        form = self.contender.form
        intact = self._attend(form.first)
        self._hold(intact)
        with form.damaged():
            damaged = self._attend(form.first)
        restored = self._attend(form.first)
        return Checks(error=self.error, limit=ATTENTION_LIMIT, poison=poison_outcome(intact, damaged, restored))

    def warm_up(self) -> None:
        """Attends to every copy once: what an implementation keeps of a page that it has seen is not timed."""
        for held in self.contender.form:
            self._attend(held)

    def turn(self) -> list[float]:
        """One timed call; its output is held to what is expected, too."""
        held = self.contender.form.take()
        started = perf_counter()
        out = self._attend(held)
        seconds = perf_counter() - started
        self._hold(out)
        return [seconds]

    def _attend(self, held: object) -> Tensor:
        return self.contender.attend(self.query, held)

    def _hold(self, out: Tensor) -> None:
        self.error = max(self.error, relative_error(out, self.expected))


class _Trials:
    """All contenders at one context."""

    def __init__(
        self,
        settings: KernelSettings,
        context: int,
        implementations: Sequence[str],
        read: PureRead,
        step: StepCounter,
    ) -> None:
        self._settings = settings
        self._context = context
        self._implementations = implementations
        self._read = read
        self._step = step

    def rows(self, cache_bytes: int) -> list[KernelRow]:
        """Checks all contenders, times those that passed, and gives the figures of those that still pass."""
        trials = list(self._trials())
        checks = {}
        for trial in trials:
            self._say(f"checking {trial.contender.name}")
            checks[trial.contender.name] = trial.checks()
        timed = [trial for trial in trials if checks[trial.contender.name].passed]
        self._say("copies")
        self._prepare(timed, cache_bytes)
        rounds = self._rounds(timed)
        for trial in timed:
            name = trial.contender.name
            checks[name] = checks[name].model_copy(update={"error": trial.error})
        passed = [trial.contender for trial in timed if checks[trial.contender.name].passed]
        yardstick = strongest([rounds[contender.name] for contender in passed if contender.kind == "baseline"])
        return [
            self._row(
                trial.contender,
                checks[trial.contender.name],
                self._figures(trial.contender.form, rounds, trial.contender.name, yardstick)
                if trial.contender in passed
                else None,
            )
            for trial in trials
        ]

    def _trials(self) -> Iterator[_Trial]:
        settings = self._settings
        generator = torch.Generator().manual_seed(settings.seed)

        def normal(heads: int, tokens: int) -> Tensor:
            shape = (settings.batch, heads, tokens, settings.head_dim)
            return torch.randn(shape, generator=generator).bfloat16()

        query = normal(settings.query_heads, settings.queries)
        keys, values = normal(settings.kv_heads, self._context), normal(settings.kv_heads, self._context)
        scale = settings.head_dim**-0.5
        dense = DenseForm(keys, values)
        expected = exact(query, *dense.decoded(), scale)
        for name in BASELINES:
            yield _Trial(baseline(name, dense, scale), query, expected)
        for profile, implementation in product(settings.profiles, self._implementations):
            self._say(f"filling {profile}")
            form = PagedForm.fill(keys, values, profile, settings.query_heads, implementation)
            expected = exact(query, *form.decoded(), scale)
            yield _Trial(paged(profile, form, scale, implementation), query, expected)

    def _prepare(self, timed: Sequence[_Trial], cache_bytes: int) -> None:
        """As many copies as are read before one comes up again, or one per call if those are fewer; all cold."""
        users = [id(trial.contender.form) for trial in timed]
        for trial in timed:
            form = trial.contender.form
            calls = self._settings.rounds * users.count(id(form))
            form.copy(min(-(-cache_bytes // form.nbytes), calls))
            trial.warm_up()
            self._read.method(form.nbytes)
        self._read.sweep()

    def _rounds(self, timed: Sequence[_Trial]) -> dict[str, list[list[float]]]:
        turns: dict[str, Callable[[], Sequence[float]]] = {trial.contender.name: trial.turn for trial in timed}
        for nbytes in {trial.contender.form.nbytes for trial in timed}:
            turns[_read_name(nbytes)] = partial(self._read.turn, nbytes)
        total = self._settings.rounds
        return interleave(turns, total, lambda index: self._say(f"round {index + 1} of {total}"))

    def _figures(
        self, form: Form[Any], rounds: dict[str, list[list[float]]], name: str, yardstick: Rounds | None
    ) -> KernelFigures:
        timing = Timing.of(rounds[name])
        read = rounds[_read_name(form.nbytes)]
        return KernelFigures(
            timing=timing,
            read=Timing.of(read),
            ns_per_token=1e9 * timing.median / (self._settings.batch * self._context * self._settings.kv_heads),
            gigabytes_per_second=form.nbytes / timing.median / 1e9,
            speedup=None if yardstick is None else ratio(yardstick, rounds[name]),
            of_read=ratio(read, rounds[name]),
        )

    def _row(self, contender: Contender[Any], checks: Checks, figures: KernelFigures | None) -> KernelRow:
        form = contender.form
        return KernelRow(
            name=contender.name,
            kind=contender.kind,
            context=self._context,
            nbytes=form.nbytes,
            bytes_per_element=form.nbytes / form.elements,
            checks=checks,
            figures=figures,
        )

    def _say(self, what: str) -> None:
        self._step(f"{self._context} tokens: {what}")


def _read_name(nbytes: int) -> str:
    return f"read {nbytes}"
