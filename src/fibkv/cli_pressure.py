"""`fibkv demo --pressure`: options -> one run -> print -> exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from fibkv.files import write_text
from fibkv.pressure_result import PressureSettings


def run(
    model: Any, tokenizer: Any, text: str, name: str, settings: PressureSettings, json: Path | None, plot: Path | None
) -> None:
    """Runs the demonstration of memory pressure and prints its outcome; exit code 1 if it did not hold."""
    from fibkv.pressure_run import run_pressure  # noqa: PLC0415 - imports transformers
    from fibkv.pressure_view import live_view, render, save_plot  # noqa: PLC0415

    with live_view(Console(stderr=True), settings) as on_tick:
        result = run_pressure(model, tokenizer, text, name=name, settings=settings, on_tick=on_tick)
    Console().print(render(result))
    if json is not None:
        write_text(json, result.to_json())
    if plot is not None:
        save_plot(result, plot)
    if not result.passed:
        raise typer.Exit(1)
