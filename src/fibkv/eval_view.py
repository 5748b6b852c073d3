"""Shows an evaluation: tables and notes on a console, and the frontier in a file."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fibkv.calibration_file import CalibrationInfo
from fibkv.demo_view import verdict
from fibkv.eval_result import EvalResult, EvalRow
from fibkv.plot import label_points, new_figure

_MARKERS = {"fibkv": ("o", "tab:blue"), "transformers": ("s", "tab:orange"), "simulated": ("^", "tab:gray")}


def render_eval(result: EvalResult) -> RenderableType:
    """Figures, errors of attention, poison tests and notes; 100 columns are enough."""
    parts = (_figures(result), _drifts(result), _errors(result), _poison_tests(result))
    return Group(*parts, *(Text(f"· {note}", style="dim") for note in eval_notes(result)))


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("cache", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _figures(result: EvalResult) -> Table:
    headings = ("bits", "all bits", "PPL", "KL mean", "KL p99", "top-1", "needle", "multi-key")
    table = _table(f"fibkv eval: {result.model}", *headings)
    dense = (result.dense_single / result.planted_single, result.dense_multi / result.planted_multi)
    table.add_row("dense", "-", "-", f"{result.dense_perplexity:.3f}", "-", "-", "-", *(f"{d:.1%}" for d in dense))
    for row in result.rows:
        table.add_row(
            row.title,
            f"{row.codec_bits:.3f}",
            f"{row.all_bits:.3f}",
            f"{row.quality.perplexity:.3f}",
            f"{row.quality.kl_mean:.5f}",
            f"{row.quality.kl_p99:.4f}",
            f"{row.quality.top1:.1%}",
            f"{row.recalled_single / result.planted_single:.1%}",
            f"{row.recalled_multi / result.planted_multi:.1%}",
        )
    return table


def _drifts(result: EvalResult) -> Table:
    used = result.settings
    decoded, buckets = used.window_tokens - used.drift_prompt, used.drift_buckets
    table = _table("KL by decoded token", *(f"to {decoded * (i + 1) // buckets}" for i in range(buckets)))
    for row in result.rows:
        table.add_row(row.title, *(f"{kl:.5f}" for kl in row.drift))
    return table


def _errors(result: EvalResult) -> Table:
    headings = ("logit MSE", "TV", "KL", "top-8", "value MSE", "worst TV", "layer.head")
    table = _table("attention, mean over layers and heads", *headings)
    for row in result.rows:
        mean, worst = row.mean_errors, row.worst_head
        table.add_row(
            row.title,
            f"{mean.logit_mse:.5f}",
            f"{mean.attention_tv:.4f}",
            f"{mean.attention_kl:.5f}",
            f"{mean.topk_agreement:.3f}",
            f"{mean.value_aggregation_mse:.2e}",
            f"{worst.errors.attention_tv:.4f}",
            f"{worst.layer}.{worst.head}",
        )
    return table


def _poison_tests(result: EvalResult) -> Table:
    table = Table("cache", "poison test", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in result.rows:
        table.add_row(row.title, verdict(row.poison))
    return table


def eval_notes(result: EvalResult) -> list[str]:
    """What has to be said under the tables."""
    used = result.settings
    return [
        f"Text: {used.num_windows} windows of {used.window_tokens} tokens "
        f"({'each starts with a BOS token' if result.bos else 'no BOS token'}); KL is KL(dense || row) in nats.",
        f"Read-through: tokens are fed in chunks of {used.chunk_tokens}, each sealed before attention sees it. "
        f"Every row keeps the first {used.sinks} and, after each chunk, the newest {used.window} tokens raw.",
        f"bits: codes, norms, scales and tables over compressed elements at {used.window_tokens} tokens (tables are "
        "shared by all layers and weigh less in a longer cache). all bits: every byte counted over all elements, "
        "raw regions, page metadata and slack included.",
        f"Needles: {used.num_prompts} prompts each, one and {used.num_needles} planted values to a prompt "
        f"({result.planted_single} and {result.planted_multi} in all), teacher-forced.",
        f"Drift: {used.drift_prompt} tokens at once, the rest of a window one by one, caches as in use (new tokens "
        "exact, full pages of 64 sealed).",
        f"Attention: {used.num_queries} queries per head on the dense model's own keys, values and queries; worst is "
        "the head with the largest total variation.",
        "Rows of transformers and simulated ones are quantized and decoded at once and kept dense: their quality is "
        "measured, their bits are counted, they save no memory here. Groups (g) have a float16 scale and zero.",
        *(f"Skipped: {name}: {reason}." for name, reason in result.skipped),
        f"Model: {result.model}, {result.num_parameters / 1e6:.1f} M parameters, {result.dtype}. "
        f"{result.conditions.command}, {result.conditions.started}, {result.seconds:.0f} s.",
        *result.caveats,
    ]


def render_calibration(info: CalibrationInfo) -> RenderableType:
    """Key spaces, sensitivities and the recommended codecs of a calibration."""
    spaces = Table("codec", "key space", "KL", title="all layers", title_justify="left", box=SIMPLE_HEAD)
    for trial in info.spaces:
        spaces.add_row(trial.profile, trial.space, f"{trial.kl:.5f}")
    alone = Table("layer", "role", "codec", "bits", "KL", title="alone", title_justify="left", box=SIMPLE_HEAD)
    for one in info.sensitivities:
        alone.add_row(str(one.layer), one.role, one.profile, f"{one.bits:.3f}", f"{one.kl:.5f}")
    best = info.recommendation
    chosen = Table("layer", "keys", "values", title="recommended", title_justify="left", box=SIMPLE_HEAD)
    for layer in best.layers:
        chosen.add_row(str(layer.layer), layer.keys, layer.values)
    text = f"{best.bits:.3f} bits on average (asked: {best.target_bits:g}), KL {best.kl:.5f}; "
    return Group(spaces, alone, chosen, Text(f"{text}best single codec within it: {best.uniform_kl:.5f}"))


def plot_eval(result: EvalResult, path: Path) -> None:
    """The frontier: mean KL over counted bits of the codec, one point per cache, the best of each rate joined.

    Raises:
        FibkvError: matplotlib is not installed.
    """
    figure = new_figure(11, 8)
    axes = figure.add_subplot()
    titles: dict[tuple[float, float], str] = {}
    for row in result.rows:
        marker, color = _MARKERS[row.kind]
        point = (row.codec_bits, row.quality.kl_mean)
        axes.plot(*point, marker, color=color)
        # Caches that came out the same share a label.
        titles[point] = f"{titles[point]} = {row.title}" if point in titles else row.title
    for kind, (marker, color) in _MARKERS.items():
        axes.plot([], [], marker, color=color, label=kind)
    axes.legend()
    best = frontier(result.rows)
    axes.plot([row.codec_bits for row in best], [row.quality.kl_mean for row in best], color="tab:blue", alpha=0.4)
    axes.margins(0.16, 0.1)
    axes.set(yscale="log", xlabel="counted bits per element (codes, norms, scales, tables)")
    axes.set(ylabel="mean KL(dense || row), nats", title=f"{result.model}, read-through")
    label_points(axes, titles, size=7)
    figure.savefig(path)


def frontier(rows: tuple[EvalRow, ...]) -> list[EvalRow]:
    """The rows that no other beats in both bits and KL, from the fewest bits."""
    best: list[EvalRow] = []
    for row in sorted(rows, key=lambda one: (one.codec_bits, one.quality.kl_mean)):
        if not best or row.quality.kl_mean < best[-1].quality.kl_mean:
            best.append(row)
    return best
