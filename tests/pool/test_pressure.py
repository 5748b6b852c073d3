"""The demonstration of memory pressure at a small size: who finishes, who is refused, what it costs the others."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from fibkv import embedded
from fibkv.errors import ContractError
from fibkv.pressure_result import PressureResult, PressureSettings, Tick
from fibkv.pressure_run import run_pressure
from fibkv.pressure_view import live_view, parts, render, save_plot

SMALL = {"sequences": 8, "prompt_tokens": 480, "new_tokens": 8, "arrivals": 4.0}


@pytest.fixture(scope="module")
def results() -> dict[str, PressureResult]:
    model, tokenizer = embedded.load()
    text = embedded.heldout_text()[:30_000]

    def run(**changed: object) -> PressureResult:
        ticks: list[Tick] = []
        settings = PressureSettings(**{**SMALL, **changed})
        result = run_pressure(model, tokenizer, text, name="embedded", settings=settings, on_tick=ticks.append)
        assert tuple(ticks) == result.ticks
        return result

    return {"roomy": run(fits=30), "half": run(fits=4), "tight": run(fits=1, waits=False), "patient": run(fits=1)}


def test_with_room_nothing_is_compressed(results: dict[str, PressureResult]) -> None:
    roomy = results["roomy"]
    assert roomy.passed
    assert roomy.finished == 8
    assert roomy.ticks[-1].pool.recoded_pages == 0
    assert roomy.kl < 1e-5, "raw pages in float16 beside a float32 model"


def test_all_are_live_at_once_in_half_of_their_memory(results: dict[str, PressureResult]) -> None:
    half = results["half"]
    assert half.passed
    assert half.poison is not None
    assert half.poison.passed
    assert not half.model_copy(update={"poison": None}).passed
    assert half.finished == 8
    assert max(tick.live for tick in half.ticks) == 8
    assert half.peak <= half.budget + half.layers * half.page_nbytes
    assert half.ticks[-1].pool.recoded_pages > 0
    assert 1e-5 < half.kl < 0.2


def test_what_does_not_fit_is_refused_and_the_others_go_on(results: dict[str, PressureResult]) -> None:
    tight = results["tight"]
    assert tight.passed
    assert 0 < tight.finished < 8
    assert tight.peak <= tight.budget + tight.layers * tight.page_nbytes
    assert [row.kl is None for row in tight.sequences] == [not row.finished for row in tight.sequences]
    assert tight.kl < 0.4, "no more than the loss of the last rung"


def test_what_may_wait_is_not_lost(results: dict[str, PressureResult]) -> None:
    patient = results["patient"]
    assert patient.passed
    assert patient.finished == 8
    assert max(tick.waiting for tick in patient.ticks) > 0


def test_bytes_return_when_all_have_finished(results: dict[str, PressureResult]) -> None:
    for result in results.values():
        last = result.ticks[-1]
        assert last.pool.allocated == last.pool.tables
        for tick in result.ticks:
            assert sum(parts(tick.pool).values()) == tick.pool.allocated


def test_results_are_shown(results: dict[str, PressureResult], tmp_path: Path) -> None:
    console = Console(width=80, record=True, force_terminal=True)
    half = results["half"]
    with live_view(console, half.settings) as on_tick:
        on_tick(half.ticks[5])
    console.print(render(half))
    text = console.export_text()
    assert "8 of 8 finished" in text
    assert "pages re-encoded" in text
    save_plot(half, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert PressureResult.from_json(half.to_json()) == half


def test_a_text_that_is_too_short_is_refused() -> None:
    model, tokenizer = embedded.load()
    with pytest.raises(ContractError, match="at least 488 tokens"):
        run_pressure(model, tokenizer, "short", name="", settings=PressureSettings(**SMALL), on_tick=lambda tick: None)
