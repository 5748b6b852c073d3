"""What is printed and drawn: every figure with its conditions, none behind a failed check."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from rich.console import Console

from fibkv.bench_plot import plot_kernels, plot_models
from fibkv.bench_result import Checks, KernelResult, ModelResult, PrefillResult, StepResult
from fibkv.bench_view import kernel_notes, model_notes, render_kernels, render_models
from fibkv.quality_result import PoisonOutcome

BROKEN = Checks(error=0.5, limit=0.03, poison=PoisonOutcome(moved=0.0, restored=True), materialized=3)


def _shown(rendered: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=80)
    console.print(rendered)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def _line(lines: list[str], name: str) -> str:
    return next(line for line in lines if line.startswith(f" {name} "))


def test_kernel_tables_show_the_figures(kernel_result: KernelResult) -> None:
    lines = _shown(render_kernels(kernel_result))
    assert not any("…" in line for line in lines)
    for context in (128, 256):
        start = lines.index(next(line for line in lines if line.startswith(f"One query token, {context} cached")))
        for row in kernel_result.rows:
            if row.context == context:
                cells = _line(lines[start:], row.name)
                assert row.figures is not None
                assert f"{row.bytes_per_element:.3f}" in cells
                assert f"{row.figures.speedup:.2f}x" in cells
                assert f"{row.figures.of_read:.0%}" in cells
    name = kernel_result.rows[-1].name
    checked = _line(lines[next(i for i, line in enumerate(lines) if line.startswith(" checked")) :], name)
    worst = max(row.checks.error for row in kernel_result.rows if row.name == name)
    assert f"{worst:.2%}" in checked
    assert "output moved by" in checked
    assert "restored exactly" in checked


def test_kernel_tables_say_how_many_queries(kernel_result: KernelResult) -> None:
    settings = kernel_result.settings.model_copy(update={"queries": 40})
    lines = _shown(render_kernels(kernel_result.model_copy(update={"settings": settings})))
    assert any(line.startswith("40 query tokens, 128 cached tokens") for line in lines)


def test_prefill_behind_cached_tokens_shows_ratios(prefill_result: PrefillResult) -> None:
    settings = prefill_result.settings.model_copy(update={"cached": 300})
    result = prefill_result.model_copy(update={"settings": settings})
    lines = _shown(render_models(result))
    assert any(line.startswith("Prefill, 256 tokens behind 300 cached ones") for line in lines)
    assert any("ratio" in line and "overhead" not in line for line in lines[:4])
    assert "1.00x" in _line(lines, "DynamicCache sdpa")
    assert any("Ratio: how many times as fast as the dense row" in note for note in model_notes(result))


def test_kernel_notes_say_the_conditions(kernel_result: KernelResult) -> None:
    said = " ".join(kernel_notes(kernel_result))
    conditions = kernel_result.conditions
    for words in (
        "4 query heads, 2 KV heads, head_dim 64, batch 1",
        "2 interleaved rounds",
        "1 MiB are read",
        conditions.cpu,
        f"torch on {conditions.instruction_set}",
        "threads: 1",
        "reference: yes",
        conditions.started,
        conditions.command,
    ):
        assert words in said
    assert all(method in said for _, method in kernel_result.read_methods)


@pytest.mark.parametrize("kind", ["step_result", "prefill_result"])
def test_model_tables_show_the_figures(kind: str, request: pytest.FixtureRequest) -> None:
    result = request.getfixturevalue(kind)
    lines = _shown(render_models(result))
    assert not any("…" in line for line in lines)
    for row in result.rows:
        cells = _line(lines, row.name)
        assert f"{row.of_dense:.3f}" in cells
        compared = f"{row.figures.speedup:.2f}x" if kind == "step_result" else f"{row.figures.overhead:+.1%}"
        assert compared in cells
    said = " ".join(model_notes(result))
    for words in ("1 layers, hidden size 64", "at most 10%", result.conditions.cpu, result.conditions.command):
        assert words in said
    for name, reason in result.skipped:
        assert f"Skipped: {name}: {reason}." in said


def test_a_row_that_fails_is_shown_without_figures(kernel_result: KernelResult) -> None:
    broken = kernel_result.rows[0].model_copy(update={"checks": BROKEN, "figures": None})
    result = kernel_result.model_copy(update={"rows": (broken, *kernel_result.rows[1:])})
    assert not result.passed
    lines = _shown(render_kernels(result))
    cells = _line(lines, broken.name).split()
    assert cells[-7:] == ["-"] * 7
    said = " ".join(lines)
    assert "FAILED: 50.00%" in said
    assert "FAILED: output did not move" in said
    assert "FAILED: 3 dense copies" in said


@pytest.mark.parametrize("kind", ["step_result", "prefill_result"])
def test_a_cache_that_fails_is_shown_without_figures(kind: str, request: pytest.FixtureRequest) -> None:
    result = request.getfixturevalue(kind)
    broken = result.rows[-1].model_copy(update={"checks": BROKEN, "figures": None})
    failed = result.model_copy(update={"rows": (*result.rows[:-1], broken)})
    assert not failed.passed
    assert _line(_shown(render_models(failed)), broken.name).split()[-5:] == ["-"] * 5


def test_the_worst_of_several_checks() -> None:
    good = Checks(error=0.01, limit=0.03, poison=PoisonOutcome(moved=0.2, restored=True))
    late = Checks(error=0.02, limit=0.02, poison=PoisonOutcome(moved=0.1, restored=False), materialized=1)
    assert Checks.worst([good, good]) == good
    assert Checks.worst([good, late]) == late
    assert good.passed
    for change in ({"error": 0.031}, {"materialized": 1}, {"poison": PoisonOutcome(moved=0.0, restored=True)}):
        assert not good.model_copy(update=change).passed
    assert not late.passed


def _drawn(plot: Callable[[Any, Path], None], result: Any, path: Path) -> str:
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text
        plot(result, path)
    return path.read_text()


def test_kernel_plot_has_a_line_per_contender_and_the_pure_read(kernel_result: KernelResult, tmp_path: Path) -> None:
    drawn = _drawn(plot_kernels, kernel_result, tmp_path / "kernels.svg")
    for name in (row.name for row in kernel_result.rows):
        assert name in drawn
    for words in ("cached tokens", "ms per step and layer, median", "pure read of as many bytes", ">128<", ">256<"):
        assert words in drawn


def test_model_plots_have_a_bar_per_cache(
    step_result: StepResult, prefill_result: PrefillResult, tmp_path: Path
) -> None:
    results: list[tuple[ModelResult, str]] = [(step_result, "ms per token"), (prefill_result, "ms per prompt")]
    for result, axis in results:
        broken = result.rows[-1].model_copy(update={"checks": BROKEN, "figures": None, "name": "broken"})
        drawn = _drawn(plot_models, result.model_copy(update={"rows": (*result.rows[:-1], broken)}), tmp_path / "m.svg")
        assert axis in drawn
        assert all(row.name in drawn for row in result.rows[:-1])
        assert "broken" not in drawn
