"""The command line: options -> one call of the library -> print -> exit code.

Commands import what they run when they run: help, versions and wrong usage load no torch.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import fibkv
from fibkv import cli_bench, cli_demo, cli_eval, cli_pages, cli_plan
from fibkv.errors import FibkvError
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
app.command("demo")(cli_demo.demo)
app.command("eval")(cli_eval.evaluate)
app.command("calibrate")(cli_eval.calibrate)
app.command("plan")(cli_plan.plan)


def main() -> None:
    """Runs the command; an error of fibkv or of the file system becomes one line on stderr and exit code 1."""
    if not sys.stderr.isatty():
        # transformers draws one of its own while it loads weights.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
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


@codebooks.command("list")
def list_codebooks() -> None:
    """The shipped codebooks: training and held-out distortion, and that of 40,000 vectors with gain correction."""
    from fibkv import codebook
    from fibkv.codecs.fib import unit_distortion
    from fibkv.parameters import FibParameters

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
    from fibkv.training import build_shipped

    with terminal_progress("building codebooks") as progress:
        build_shipped(directory, progress=progress)
