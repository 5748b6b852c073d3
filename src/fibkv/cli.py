"""The command line: options -> one call of the library -> print -> exit code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import fibkv
from fibkv import cli_bench, cli_eval, cli_pages, cli_plan, cli_pressure, codebook, embedded
from fibkv.codecs.fib import unit_distortion
from fibkv.demo_result import DemoSettings
from fibkv.errors import FibkvError
from fibkv.files import write_text
from fibkv.parameters import FibParameters
from fibkv.pressure_result import PressureSettings
from fibkv.progress import terminal_progress

app = typer.Typer(
    help=fibkv.__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
codebooks = typer.Typer(
    help="FibQuant codebooks: those that are shipped, and how they were made.", no_args_is_help=True
)
app.add_typer(codebooks, name="codebooks")
app.add_typer(cli_bench.app, name="bench")
app.add_typer(cli_pages.app, name="pages")
app.command("eval")(cli_eval.evaluate)
app.command("calibrate")(cli_eval.calibrate)
app.command("plan")(cli_plan.plan)

DEFAULTS = DemoSettings()
UNDER_PRESSURE = PressureSettings()


def main() -> None:
    """Runs the command; an error of fibkv or of the file system becomes one line on stderr and exit code 1."""
    try:
        app()
    except (FibkvError, OSError) as error:
        Console(stderr=True).print(f"fibkv: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        print(fibkv.__version__)
        raise typer.Exit


@app.command()
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
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot of KL over counted bits to this file.")] = None,
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
    # Here, so that `fibkv --help` does not wait for transformers and `fibkv codebooks` does not need it.
    from fibkv.demo import run_demo, standard_variants  # noqa: PLC0415
    from fibkv.demo_view import progress_bar, render, save_plot  # noqa: PLC0415

    if (model is None) != (text is None):
        raise typer.BadParameter("--model and --text go together")
    console = Console()
    name = "embedded reference model" if model is None else str(model)
    chosen = dtype or ("float32" if model is None else "auto")
    if pressure:
        loaded, tokenizer = embedded.load_directory(model or embedded.model_dir(), chosen)
        held_out = embedded.heldout_text() if text is None else embedded.read_text(text)
        settings = PressureSettings(sequences=sequences, fits=fits, waits=wait, num_threads=threads)
        cli_pressure.run(loaded, tokenizer, held_out, name, settings, json, plot)
        return
    with progress_bar(Console(stderr=True)) as progress:
        loaded, tokenizer = embedded.load_directory(model or embedded.model_dir(), chosen)
        result = run_demo(
            loaded,
            tokenizer,
            embedded.heldout_text() if text is None else embedded.read_text(text),
            name=name,
            variants=standard_variants(),
            settings=DemoSettings(
                num_windows=windows,
                window_tokens=window_tokens,
                num_prompts=prompts,
                num_threads=threads,
                chunk_tokens=chunk_tokens,
            ),
            caveats=embedded.CAVEATS if model is None else (),
            progress=progress,
        )
    console.print(render(result))
    if json is not None:
        write_text(json, result.to_json())
    if plot is not None:
        save_plot(result, plot)
    if not result.passed:
        raise typer.Exit(1)


@codebooks.command("list")
def list_codebooks() -> None:
    """The shipped codebooks: training and held-out distortion, and that of 40,000 vectors with gain correction."""
    table = Table(title="E|u - û|² of unit vectors: trained on, held out, gain-corrected")
    for heading in ("k", "N", "bits", "train", "d=64", "d=128", "gain, d=128", "digest"):
        table.add_column(heading, justify="right")
    for block_dim, size in codebook.SHIPPED:
        report = codebook.load(block_dim, size).report
        bits = (size - 1).bit_length() / block_dim
        figures = (report.train_distortion, report.held_out_at(64), report.held_out_at(128))
        gained = unit_distortion(FibParameters.of(128, block_dim, size, norm_format="f16"), vectors=40_000)
        table.add_row(
            str(block_dim),
            str(size),
            f"{bits:g}",
            *(f"{figure:.5f}" for figure in (*figures, gained)),
            report.codebook_digest.removeprefix("blake3:")[:8],
        )
    Console().print(table)


@codebooks.command("build")
def build_codebooks(directory: Annotated[Path, typer.Argument(help="Where to write them.")]) -> None:
    """Rebuild the shipped codebooks from nothing (about ten minutes on 2 cores)."""
    from fibkv.training import build_shipped  # noqa: PLC0415 - imports scipy

    with terminal_progress("building codebooks") as progress:
        build_shipped(directory, progress=progress)
