"""`fibkv demo`: options -> one run -> print -> exit code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console, RenderableType

from fibkv import embedded
from fibkv.demo_result import DemoResult, DemoSettings
from fibkv.files import writable, write_text
from fibkv.pressure_result import PressureResult, PressureSettings

DEFAULTS = DemoSettings()
UNDER_PRESSURE = PressureSettings()

Result = TypeVar("Result", DemoResult, PressureResult)


def demo(
    model: Annotated[
        Path | None, typer.Option(help="Model directory of transformers; default: the embedded model.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text that the model was not trained on; goes with --model.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of text.")] = DEFAULTS.num_windows,
    window_tokens: Annotated[int, typer.Option(min=2, help="Tokens per window and prompt.")] = DEFAULTS.window_tokens,
    prompts: Annotated[int, typer.Option(min=1, help="Needle prompts.")] = DEFAULTS.num_prompts,
    chunk_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens fed at a time; few of them are attended to in decoding's arithmetic.")
    ] = DEFAULTS.chunk_tokens,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16; default: float32, with --model as it is stored.")
    ] = None,
    threads: Annotated[
        int, typer.Option(min=1, help="CPU threads of torch; a model as small as ours is no faster with more.")
    ] = DEFAULTS.num_threads,
    json: Annotated[Path | None, typer.Option(callback=writable, help="Write all figures to this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(callback=writable, help="Write a plot of KL over counted bits to this file.")
    ] = None,
    pressure: Annotated[
        bool, typer.Option("--pressure", help="Instead: sequences arrive into a budget that is too small for them.")
    ] = False,
    sequences: Annotated[int, typer.Option(min=1, help="With --pressure: how many arrive.")] = UNDER_PRESSURE.sequences,
    fits: Annotated[int, typer.Option(min=1, help="With --pressure: how many fit at 16 bits.")] = UNDER_PRESSURE.fits,
    wait: Annotated[
        bool, typer.Option(help="With --pressure: what does not fit waits, and is not refused.")
    ] = UNDER_PRESSURE.waits,
) -> None:
    """Compare compressed caches with the dense one: quality, needles, speed, counted bits, poison test.

    Exit code 1 if a cache was not really read: the poison test failed, or dense copies were made; with --pressure if
    the budget did not hold, or a sequence that could have waited was lost.
    """
    if (model is None) != (text is None):
        raise typer.BadParameter("--model and --text go together")
    name = "embedded reference model" if model is None else str(model)
    directory, chosen = model or embedded.model_dir(), dtype or ("float32" if model is None else "auto")
    held_out = embedded.heldout_text() if text is None else embedded.read_text(text)
    if pressure:
        arriving = PressureSettings(sequences=sequences, fits=fits, waits=wait, num_threads=threads)
        _finish(*_under_pressure(directory, chosen, held_out, name, arriving), json, plot)
        return
    settings = DemoSettings(
        num_windows=windows,
        window_tokens=window_tokens,
        num_prompts=prompts,
        num_threads=threads,
        chunk_tokens=chunk_tokens,
    )
    caveats = embedded.CAVEATS if model is None else ()
    _finish(*_compared(directory, chosen, held_out, name, settings, caveats), json, plot)


def _compared(
    directory: Path, dtype: str, text: str, name: str, settings: DemoSettings, caveats: tuple[str, ...]
) -> tuple[DemoResult, RenderableType, Callable[[DemoResult, Path], None]]:
    from fibkv.demo import run_demo, standard_variants
    from fibkv.demo_view import progress_bar, render, save_plot

    with progress_bar(Console(stderr=True)) as progress:
        model, tokenizer = embedded.load_directory(directory, dtype)
        result = run_demo(
            model,
            tokenizer,
            text,
            name=name,
            variants=standard_variants(),
            settings=settings,
            caveats=caveats,
            progress=progress,
        )
    return result, render(result), save_plot


def _under_pressure(
    directory: Path, dtype: str, text: str, name: str, settings: PressureSettings
) -> tuple[PressureResult, RenderableType, Callable[[PressureResult, Path], None]]:
    from fibkv.pressure_run import run_pressure
    from fibkv.pressure_view import live_view, render, save_plot

    model, tokenizer = embedded.load_directory(directory, dtype)
    with live_view(Console(stderr=True), settings) as on_tick:
        result = run_pressure(model, tokenizer, text, name=name, settings=settings, on_tick=on_tick)
    return result, render(result), save_plot


def _finish(
    result: Result,
    shown: RenderableType,
    save_plot: Callable[[Result, Path], None],
    json: Path | None,
    plot: Path | None,
) -> None:
    """Prints and writes a result; exit code 1 if it did not pass."""
    Console().print(shown)
    if json is not None:
        write_text(json, result.to_json())
    if plot is not None:
        save_plot(result, plot)
    if not result.passed:
        raise typer.Exit(1)
