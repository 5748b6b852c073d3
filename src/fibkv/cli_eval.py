"""`fibkv eval` and `fibkv calibrate`: options -> one run -> print -> exit code. Defaults are those of the settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fibkv import embedded
from fibkv.errors import ModelError
from fibkv.files import writable, write_text
from fibkv.regions import ProtectedRegions

TABLE_WIDTH = 104
EMBEDDED = "embedded"

Model = Annotated[str, typer.Argument(help="Model directory of transformers, or 'embedded'.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16, float16; default: float32 embedded, else as it is stored.")
]


def evaluate(
    model: Model,
    text: Annotated[Path | None, typer.Argument(help="UTF-8 text that the model was not trained on.")] = None,
    caches: Annotated[str | None, typer.Option(help="Names of caches, by comma; default: all.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="What `fibkv calibrate` wrote, from other text than this; adds its rows.")
    ] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Windows of text.")] = None,
    window_tokens: Annotated[int | None, typer.Option(min=2, help="Tokens per window and prompt.")] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Needle prompts of either kind.")] = None,
    sinks: Annotated[int | None, typer.Option(min=0, help="First tokens that every cache keeps raw.")] = None,
    window: Annotated[int | None, typer.Option(min=0, help="Newest tokens that every cache keeps raw.")] = None,
    dtype: Dtype = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, to see that it runs.")] = False,
    json: Annotated[Path | None, typer.Option(callback=writable, help="Write the receipt to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(callback=writable, help="Write the frontier to this file.")] = None,
) -> None:
    """Quality of compressed caches against the same model's dense cache, everything read through the codecs.

    Exit code 1 if a cache was not really read: the poison test failed, or dense copies were made.
    """
    from fibkv.calibration_file import Calibration
    from fibkv.demo_view import progress_bar
    from fibkv.eval_caches import eval_variants
    from fibkv.eval_result import QUICK, EvalReceipt, EvalSettings
    from fibkv.eval_view import plot_eval, render_eval
    from fibkv.evaluate import run_eval

    given = {
        "num_windows": windows,
        "window_tokens": window_tokens,
        "num_prompts": prompts,
        "sinks": sinks,
        "window": window,
        "num_threads": threads,
    }
    changed = {name: value for name, value in given.items() if value is not None}
    settings = (QUICK if quick else EvalSettings()).model_copy(update=changed)
    with progress_bar(Console(stderr=True)) as progress:
        loaded, tokenizer = load(model, dtype)
        protected = ProtectedRegions(first_tokens_raw=settings.sinks, last_tokens_raw=settings.window)
        names = None if caches is None else tuple(name.strip() for name in caches.split(","))
        learned = None if calibration is None else Calibration.load(calibration)
        variants, skipped = eval_variants(loaded, protected, names, learned)
        result = run_eval(
            loaded,
            tokenizer,
            text_of(model, text),
            name=model,
            variants=variants,
            skipped=skipped,
            settings=settings,
            caveats=embedded.CAVEATS if model == EMBEDDED else (),
            progress=progress,
        )
    console = Console()
    # A file has no width of its own: the tables need this one.
    (console if console.is_terminal else Console(width=TABLE_WIDTH)).print(render_eval(result))
    if json is not None:
        write_text(json, EvalReceipt.of(result).to_json())
    if plot is not None:
        plot_eval(result, plot)
    if not result.passed:
        raise typer.Exit(1)


def calibrate(
    model: Model,
    texts: Annotated[list[Path] | None, typer.Argument(help="UTF-8 texts like what the model will read.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", callback=writable, help="File to write.")] = Path(
        "calibration.safetensors"
    ),
    bits: Annotated[float | None, typer.Option(help="Average of counted bits for the recommended codecs.")] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Windows of each text.")] = None,
    window_tokens: Annotated[int | None, typer.Option(min=2, help="Tokens per window.")] = None,
    trial_windows: Annotated[int | None, typer.Option(min=1, help="Windows that KL is measured on.")] = None,
    dtype: Dtype = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")] = None,
) -> None:
    """Learn key spaces and codecs per layer from texts: `fibkv.Cache(model, calibration=FILE)` uses them.

    An interrupted run goes on where it stopped when it is given again.
    """
    from fibkv.calibrate import CalibrateSettings, run_calibrate
    from fibkv.demo_view import progress_bar
    from fibkv.eval_view import render_calibration

    given = {
        "bits": bits,
        "num_windows": windows,
        "window_tokens": window_tokens,
        "trial_windows": trial_windows,
        "num_threads": threads,
    }
    settings = CalibrateSettings().model_copy(update={name: one for name, one in given.items() if one is not None})
    with progress_bar(Console(stderr=True)) as progress:
        loaded, tokenizer = load(model, dtype)
        sources = [embedded.read_text(path) for path in texts] if texts else [text_of(model, None)]
        found = run_calibrate(loaded, tokenizer, sources, output, settings=settings, progress=progress)
    Console().print(render_calibration(found.info))


def load(model: str, dtype: str | None) -> tuple[Any, Any]:
    """The model and tokenizer that an argument names."""
    if model == EMBEDDED:
        return embedded.load_directory(embedded.model_dir(), dtype or "float32")
    return embedded.load_directory(Path(model), dtype or "auto")


def text_of(model: str, text: Path | None) -> str:
    """The text of a file; only the embedded model comes with one of its own.

    Raises:
        ModelError: another model and no text.
    """
    if text is not None:
        return embedded.read_text(text)
    if model != EMBEDDED:
        raise ModelError(f"{model}: expected a text file beside a model directory, got none")
    return embedded.heldout_text()
