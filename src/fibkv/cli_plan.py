"""`fibkv plan`: options -> one plan -> print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fibkv.files import writable, write_text
from fibkv.plan_result import PlanSettings
from fibkv.sizes import parse_size

DEFAULTS = PlanSettings(memory_nbytes=0)


def plan(
    model: Annotated[Path, typer.Argument(help="Configuration of transformers (JSON), or a directory with one.")],
    memory: Annotated[str, typer.Option(help="For weights and cache together, such as 16GiB.")],
    context: Annotated[
        str | None, typer.Option(help="Tokens of a row, by comma; default: up to the model's longest.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Rows, by comma.")] = ",".join(map(str, DEFAULTS.batches)),
    profile: Annotated[str, typer.Option(help="Codecs, by comma; keys/values for a pair, as in fib4/fib2.")] = ",".join(
        DEFAULTS.profiles
    ),
    bits: Annotated[
        str | None, typer.Option(help="Instead of --profile: 1, 2, 2.5, 3, 3.5, 4, 8, 16, by comma.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Bytes of the weights; default: as stored beside the configuration, or counted.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16; default: the configuration's.")] = None,
    tokens_per_page: Annotated[int, typer.Option(min=1, help="Tokens of a sealed page.")] = DEFAULTS.tokens_per_page,
    implementation: Annotated[
        str, typer.Option(help="Kernels whose order in memory counts: auto, reference, ...")
    ] = DEFAULTS.implementation,
    json: Annotated[Path | None, typer.Option(callback=writable, help="Write everything found to this file.")] = None,
) -> None:
    """Which contexts, batch sizes and levels fit into a memory, weights included. Needs no weights."""
    from fibkv.choices import NAMES_BY_BITS, names_by_bits
    from fibkv.plan_view import render_plan
    from fibkv.planner import plan_memory

    names = tuple(name.strip() for name in profile.split(","))
    if bits is not None:
        rates = [text.strip() for text in bits.split(",")]
        # One name where keys and values share it.
        known = {str(rate): "/".join(dict.fromkeys(names_by_bits(rate))) for rate in NAMES_BY_BITS}
        if unknown := [rate for rate in rates if rate not in known]:
            raise typer.BadParameter(f"--bits: expected {', '.join(known)}, got {unknown[0]}")
        names = tuple(known[rate] for rate in rates)
    result = plan_memory(
        model,
        PlanSettings(
            memory_nbytes=parse_size(memory, field="--memory"),
            contexts=() if context is None else _numbers(context),
            batches=_numbers(batch),
            profiles=names,
            tokens_per_page=tokens_per_page,
            weights_nbytes=None if weights is None else parse_size(weights, field="--weights"),
            dtype=dtype,
            implementation=implementation,
        ),
    )
    Console().print(render_plan(result))
    if json is not None:
        write_text(json, result.to_json())


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"expected whole numbers by comma, got {text!r}") from error
