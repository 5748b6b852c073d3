"""`fibkv bench`: options -> one benchmark -> print -> exit code. All defaults are those of `fibkv.bench_settings`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

from fibkv.bench_settings import (
    QUICK_GPU,
    QUICK_KERNELS,
    QUICK_PREFILL,
    QUICK_STEPS,
    GpuSettings,
    KernelSettings,
    PrefillSettings,
    StepSettings,
)
from fibkv.files import writable, write_text

app = typer.Typer(
    help="Speed, measured so that it cannot flatter: checked outputs, cold operands, the strongest baseline, "
    "interleaved rounds. Exit code 1 if a check failed.",
    no_args_is_help=True,
)

QueryHeads = Annotated[int | None, typer.Option(min=1, help="Query heads.")]
KVHeads = Annotated[int | None, typer.Option("--kv-heads", min=1, help="KV heads.")]
HeadDim = Annotated[int | None, typer.Option(min=2, help="Head dimension.")]
Layers = Annotated[int | None, typer.Option(min=1, help="Decoder layers.")]
HiddenSize = Annotated[int | None, typer.Option(min=1, help="Width of the model.")]
Profiles = Annotated[str | None, typer.Option(help="Codecs, by comma; keys/values for a pair, as in fib4/fib2.")]
Implementation = Annotated[str | None, typer.Option(help="Kernels: auto, or a name of fibkv.kernels.available().")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of torch; default: torch's.")]
NumRounds = Annotated[int | None, typer.Option("--rounds", min=1, help="Interleaved rounds.")]
CacheBytes = Annotated[
    int | None,
    typer.Option(min=0, help="Bytes read before an operand comes up again; default: twice the last-level cache."),
]
Seed = Annotated[int | None, typer.Option(help="Of all random numbers.")]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny sizes, to see that it runs; the figures mean nothing.")]
Json = Annotated[Path | None, typer.Option(callback=writable, help="Write all figures to this file.")]
Plot = Annotated[Path | None, typer.Option(callback=writable, help="Write a plot to this file.")]


@app.command()
def kernels(
    query_heads: QueryHeads = None,
    kv_heads: KVHeads = None,
    head_dim: HeadDim = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows.")] = None,
    queries: Annotated[int | None, typer.Option(min=1, help="Query tokens: one, or those of a chunk.")] = None,
    contexts: Annotated[str | None, typer.Option(help="Cached tokens, by comma.")] = None,
    profiles: Profiles = None,
    implementations: Annotated[
        str | None, typer.Option(help="Kernels, by comma: auto, or names of fibkv.kernels.available().")
    ] = None,
    threads: Threads = None,
    rounds: NumRounds = None,
    cache_bytes: CacheBytes = None,
    seed: Seed = None,
    quick: Quick = False,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """One layer's attention on compressed pages, against torch on dense bf16 and a pure read of memory."""
    from fibkv.bench_kernels import run_kernels
    from fibkv.bench_plot import plot_kernels
    from fibkv.bench_view import render_kernels

    settings = _changed(
        QUICK_KERNELS if quick else KernelSettings(),
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        batch=batch,
        queries=queries,
        contexts=None if contexts is None else _numbers(contexts),
        profiles=_names(profiles),
        implementations=_names(implementations),
        num_threads=threads,
        rounds=rounds,
        cache_bytes=cache_bytes,
        seed=seed,
    )
    _run(run_kernels, settings, render_kernels, json, plot, plot_kernels)


@app.command()
def gpu(
    query_heads: QueryHeads = None,
    kv_heads: KVHeads = None,
    head_dims: Annotated[str | None, typer.Option(help="Head dimensions, by comma.")] = None,
    batches: Annotated[str | None, typer.Option(help="Rows, by comma.")] = None,
    contexts: Annotated[str | None, typer.Option(help="Cached tokens of each row, by comma.")] = None,
    profiles: Profiles = None,
    most_tokens: Annotated[int | None, typer.Option(min=1, help="Of all rows together.")] = None,
    tune: Annotated[
        bool | None, typer.Option("--tune", help="First find the fastest launches on this device, and keep them.")
    ] = None,
    rounds: NumRounds = None,
    seed: Seed = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes on the CPU, in Triton's interpreter; the figures mean nothing.")
    ] = False,
    json: Json = None,
) -> None:
    """One decode step's attention on codes, on a GPU, against torch on dense bf16 and a plain copy."""
    from fibkv.bench_gpu import run_gpu
    from fibkv.bench_gpu_view import render_gpu

    settings = _changed(
        QUICK_GPU if quick else GpuSettings(),
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dims=None if head_dims is None else _numbers(head_dims),
        batches=None if batches is None else _numbers(batches),
        contexts=None if contexts is None else _numbers(contexts),
        profiles=_names(profiles),
        most_tokens=most_tokens,
        tune=tune,
        rounds=rounds,
        seed=seed,
    )
    _run(run_gpu, settings, render_gpu, json)


@app.command()
def steps(
    layers: Layers = None,
    hidden_size: HiddenSize = None,
    query_heads: QueryHeads = None,
    kv_heads: KVHeads = None,
    head_dim: HeadDim = None,
    context: Annotated[int | None, typer.Option(min=1, help="Cached tokens at the start.")] = None,
    profiles: Profiles = None,
    implementation: Implementation = None,
    threads: Threads = None,
    rounds: NumRounds = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Timed tokens per round.")] = None,
    cache_bytes: CacheBytes = None,
    seed: Seed = None,
    quick: Quick = False,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Whole decode steps of a random-weight Llama through generate: fibkv's caches against transformers' own."""
    from fibkv.bench_plot import plot_models
    from fibkv.bench_steps import run_steps
    from fibkv.bench_view import render_models

    settings = _changed(
        QUICK_STEPS if quick else StepSettings(),
        layers=layers,
        hidden_size=hidden_size,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context=context,
        profiles=_names(profiles),
        implementation=implementation,
        num_threads=threads,
        rounds=rounds,
        tokens=tokens,
        cache_bytes=cache_bytes,
        seed=seed,
    )
    _run(run_steps, settings, render_models, json, plot, plot_models)


@app.command()
def prefill(
    layers: Layers = None,
    hidden_size: HiddenSize = None,
    query_heads: QueryHeads = None,
    kv_heads: KVHeads = None,
    head_dim: HeadDim = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of the prompt.")] = None,
    cached: Annotated[int | None, typer.Option(min=0, help="Tokens in the cache before the prompt.")] = None,
    profiles: Profiles = None,
    implementation: Implementation = None,
    threads: Threads = None,
    rounds: NumRounds = None,
    seed: Seed = None,
    quick: Quick = False,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """A prompt through a random-weight Llama into each cache, empty or filled, against a dense one."""
    from fibkv.bench_plot import plot_models
    from fibkv.bench_prefill import run_prefill
    from fibkv.bench_view import render_models

    settings = _changed(
        QUICK_PREFILL if quick else PrefillSettings(),
        layers=layers,
        hidden_size=hidden_size,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context=context,
        cached=cached,
        profiles=_names(profiles),
        implementation=implementation,
        num_threads=threads,
        rounds=rounds,
        seed=seed,
    )
    _run(run_prefill, settings, render_models, json, plot, plot_models)


def _changed(settings: Any, **options: object) -> Any:
    """The settings with the options that were given."""
    return settings.model_copy(update={name: value for name, value in options.items() if value is not None})


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"expected whole numbers by comma, got {text!r}") from error


def _run(
    run: Callable[..., Any],
    settings: Any,
    render: Callable[[Any], RenderableType],
    json: Path | None,
    plot: Path | None = None,
    save_plot: Callable[[Any, Path], None] | None = None,
) -> None:
    from fibkv.demo_view import progress_bar

    # Between its steps the bar must not draw: that would fall into the timings.
    with progress_bar(Console(stderr=True), ticking=False) as progress:
        result = run(settings, progress)
    Console().print(render(result))
    if json is not None:
        write_text(json, result.to_json())
    if plot is not None and save_plot is not None:
        save_plot(result, plot)
    if not result.passed:
        raise typer.Exit(1)
