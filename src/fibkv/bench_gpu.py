"""`fibkv bench gpu`: one decode step's attention on codes, on a GPU, against torch on dense bfloat16 and a plain copy.

Every output is held to float64 attention on the dequantized values; damage to a page must change it; before each timed
call memory is written that pushes its operands out of the caches; contenders take turns; ratios are taken within a
round, to the strongest baseline of that size. Calls are timed on the device, and again as replayed CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor

from fibkv import kernels
from fibkv.bench_contenders import BASELINES, exact
from fibkv.bench_forms import DenseForm
from fibkv.bench_gpu_clock import Clock
from fibkv.bench_gpu_forms import CodedLayer
from fibkv.bench_gpu_result import GpuFigures, GpuResult, GpuRow
from fibkv.bench_gpu_tune import tuned
from fibkv.bench_result import ATTENTION_LIMIT, Checks
from fibkv.bench_settings import GpuSettings
from fibkv.kernels.runs import InPlace
from fibkv.kernels.triton import Triton, device_name
from fibkv.machine import Conditions
from fibkv.metrics import relative_error
from fibkv.progress import ProgressCallback, StepCounter
from fibkv.quality import poison_outcome
from fibkv.timing import Rounds, Timing, interleave, ratio, strongest

COPY = "copy of the bf16 bytes"


def run_gpu(settings: GpuSettings, progress: ProgressCallback) -> GpuResult:
    """Measures every contender at every size.

    Args:
        settings: what to measure.
        progress: told before each step.

    Raises:
        KernelError: the Triton kernels do not run on that device.
        ContractError: a profile that does not fit a head_dim.
    """
    started = perf_counter()
    device = torch.device(settings.device)
    triton = kernels.resolve("triton", device)
    assert isinstance(triton, Triton)
    # Imports triton, which the line above has made sure of.
    from fibkv.kernels import cuda_attend  # noqa: PLC0415

    conditions = Conditions.now(torch.get_num_threads())
    clock = Clock(device, settings.flushed_bytes)
    sizes = settings.sizes()
    step = StepCounter(progress, len(sizes) + (len(settings.profiles) if settings.tune else 0))
    if settings.tune:
        tunings = tuned(settings, clock, step)
        tunings.save()
        triton = Triton(device.type, tunings)
    rows: list[GpuRow] = []
    first_calls: dict[str, float] = {}
    with torch.inference_mode():
        for head_dim, batch, context in sizes:
            step(f"head_dim {head_dim}, batch {batch}, {context} tokens")
            size = _Size(settings, triton, clock, head_dim, batch, context)
            rows += size.rows()
            for name, seconds in size.first_calls.items():
                first_calls.setdefault(f"{name}, head_dim {head_dim}", seconds)
    return GpuResult(
        settings=settings,
        conditions=conditions,
        device=device_name(device),
        cuda=cuda_attend.why_not(),
        tunings=triton.tunings(device),
        first_calls=tuple(first_calls.items()),
        rows=tuple(rows),
        seconds=perf_counter() - started,
    )


@dataclass(slots=True, eq=False)
class _Contender:
    """One way to attend.

    Attributes:
        name: what a reader of the table sees.
        kind: see `GpuRow`.
        nbytes: of its operands.
        elements: that they stand for.
        call: attends once.
        expected: what it has to give; None = it is no attention.
        damaged: damages its operands while a context lasts.
        replay: the same call as a CUDA graph.
        checks: their outcome.
    """

    name: str
    kind: Literal["baseline", "copy", "fibkv"]
    nbytes: int
    elements: int
    call: Callable[[], Tensor]
    expected: Tensor | None
    damaged: Callable[[], AbstractContextManager[None]]
    replay: Callable[[], object] | None = None
    checks: Checks | None = None

    @property
    def passed(self) -> bool:
        return self.checks is None or self.checks.passed

    def check(self) -> None:
        """Attends to operands that are intact, damaged, restored."""
        if self.expected is None:
            return
        intact = self.call().clone()
        with self.damaged():
            damaged = self.call().clone()
        outcome = poison_outcome(intact, damaged, self.call())
        self.checks = Checks(error=relative_error(intact, self.expected), limit=ATTENTION_LIMIT, poison=outcome)


class _Size:
    """All contenders at one size."""

    def __init__(
        self, settings: GpuSettings, triton: InPlace, clock: Clock, head_dim: int, batch: int, context: int
    ) -> None:
        self._settings, self._triton, self._clock = settings, triton, clock
        self._head_dim, self._batch, self._context = head_dim, batch, context
        self._generator = torch.Generator(clock.device).manual_seed(settings.seed)
        self._query = self._normal(settings.query_heads, 1)
        self.first_calls: dict[str, float] = {}

    def rows(self) -> list[GpuRow]:
        """Checks all contenders, times those that passed."""
        contenders = [*self._baselines(), *map(self._coded, self._settings.profiles)]
        for contender in contenders:
            contender.check()
        timed = [contender for contender in contenders if contender.passed]
        for contender in timed:
            contender.replay = self._clock.captured(contender.call)
        called = self._rounds({contender.name: contender.call for contender in timed})
        replays = {contender.name: contender.replay for contender in timed if contender.replay is not None}
        replayed = self._rounds(replays)
        best = {name: _faster(rounds, replayed.get(name)) for name, rounds in called.items()}
        yardstick = strongest([best[contender.name] for contender in timed if contender.kind == "baseline"])
        return [self._row(contender, called, replayed, best, yardstick) for contender in contenders]

    def _rounds(self, calls: dict[str, Callable[[], Any]]) -> dict[str, list[list[float]]]:
        turns: dict[str, Callable[[], Sequence[float]]] = {
            name: lambda call=call: [self._clock.seconds(call)]  # type: ignore[misc]
            for name, call in calls.items()
        }
        return interleave(turns, self._settings.rounds, lambda _: None)

    def _baselines(self) -> Iterator[_Contender]:
        keys, values = (self._normal(self._settings.kv_heads, self._context) for _ in range(2))
        form = DenseForm(keys, values)
        scale = self._head_dim**-0.5
        expected = exact(self._query, *form.decoded(), scale)
        for name, function in BASELINES.items():

            def call(function: Callable[..., Tensor] = function) -> Tensor:
                return function(self._query, keys, values, scale)

            yield _Contender(name, "baseline", form.nbytes, form.elements, call, expected, form.damaged)
        target = torch.empty_like(keys)
        yield _Contender(COPY, "copy", form.nbytes, form.elements, lambda: target.copy_(keys), None, nullcontext)

    def _coded(self, profile: str) -> _Contender:
        layer = CodedLayer(
            profile,
            batch=self._batch,
            heads=self._settings.kv_heads,
            head_dim=self._head_dim,
            context=self._context,
            tokens_per_page=self._settings.tokens_per_page,
            generator=self._generator,
        )
        call = layer.attention(self._triton, self._query)
        started = perf_counter()
        call()
        self.first_calls[profile] = perf_counter() - started
        expected = exact(self._query.float(), *layer.decoded(), self._head_dim**-0.5)
        return _Contender(profile, "fibkv", layer.nbytes, layer.elements, call, expected, layer.damaged)

    def _row(
        self,
        contender: _Contender,
        called: dict[str, list[list[float]]],
        replayed: dict[str, list[list[float]]],
        best: dict[str, list[list[float]]],
        yardstick: Rounds | None,
    ) -> GpuRow:
        figures = None
        if contender.passed:
            name = contender.name
            figures = GpuFigures(
                called=Timing.of(called[name]),
                replayed=Timing.of(replayed[name]) if name in replayed else None,
                gigabytes_per_second=contender.nbytes / Timing.of(best[name]).median / 1e9,
                speedup=None if yardstick is None else ratio(yardstick, best[name]),
            )
        return GpuRow(
            name=contender.name,
            kind=contender.kind,
            head_dim=self._head_dim,
            batch=self._batch,
            context=self._context,
            nbytes=contender.nbytes,
            bytes_per_element=contender.nbytes / contender.elements,
            checks=contender.checks,
            figures=figures,
        )

    def _normal(self, heads: int, tokens: int) -> Tensor:
        shape = (self._batch, heads, tokens, self._head_dim)
        return torch.randn(shape, generator=self._generator, device=self._clock.device).bfloat16()


def _faster(called: list[list[float]], replayed: list[list[float]] | None) -> list[list[float]]:
    """Of the same call the faster rounds: a copy can take longer in a graph than by itself."""
    if replayed is None or Timing.of(called).median < Timing.of(replayed).median:
        return called
    return replayed
