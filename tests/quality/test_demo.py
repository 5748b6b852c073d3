from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from rich.console import Console
from transformers import Qwen2Config, Qwen2ForCausalLM

from fibkv import embedded
from fibkv.demo import run_demo, standard_variants
from fibkv.demo_result import DemoResult, DemoSettings
from fibkv.demo_view import notes, progress_bar, render, save_plot
from fibkv.errors import ContractError
from fibkv.quality import CacheVariant
from tests.quality.fakes import variant

SMALL = DemoSettings(num_windows=2, window_tokens=256, num_prompts=2, num_needles=4, new_tokens=4, rounds=1)


def _run(loaded: tuple[Any, Any], text: str, variants: tuple[CacheVariant, ...], **options: Any) -> DemoResult:
    model, tokenizer = loaded
    arguments = {"settings": SMALL, "caveats": embedded.CAVEATS, "progress": lambda *_: None} | options
    return run_demo(model, tokenizer, text, name="small", variants=variants, **arguments)


def _shown(result: DemoResult) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(render(result))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def result(loaded: tuple[Any, Any], text: str) -> DemoResult:
    fakes = (variant("exact", 0), variant("fine", 127), variant("coarse", 2), variant("unread", 127, read=False))
    return _run(loaded, text, fakes)


def test_rows_are_ordered_as_their_damage(result: DemoResult) -> None:
    exact, fine, coarse, _ = result.variants
    assert exact.quality.kl_mean < 1e-9 < fine.quality.kl_mean < 1e-3 < coarse.quality.kl_mean
    assert exact.quality.top1 == 1.0 > coarse.quality.top1
    assert exact.quality.perplexity == pytest.approx(result.dense.perplexity, rel=1e-5)
    assert coarse.quality.perplexity > 1.1 * result.dense.perplexity
    assert result.needles_planted == 8 >= result.dense.recalled > coarse.recalled
    assert exact.recalled == result.dense.recalled


def test_sizes_are_those_of_one_window(result: DemoResult) -> None:
    elements = 256 * 4 * 2 * 2 * 64  # tokens, layers, heads, keys and values, head dimension
    assert (result.dense.bits_per_element, result.dense.nbytes) == (32.0, 4 * elements)
    assert all((row.bits_per_element, row.nbytes) == (8.0, elements) for row in result.variants)


def test_a_cache_that_is_not_read_fails_the_run(result: DemoResult) -> None:
    assert [row.poison.passed for row in result.variants] == [True, True, True, False]
    assert not result.passed
    assert "FAILED: logits did not move; restored exactly" in _shown(result)


def test_a_dense_copy_fails_the_run(result: DemoResult) -> None:
    good = result.model_copy(update={"variants": result.variants[:1]})
    assert good.passed
    copied = good.variants[0].model_copy(update={"materialized": 1})
    assert not good.model_copy(update={"variants": (copied,)}).passed


def test_result_round_trips_through_json(result: DemoResult) -> None:
    assert DemoResult.from_json(result.to_json()) == result
    assert json.loads(result.to_json())["settings"]["window_tokens"] == 256


def test_the_table_shows_every_figure_with_its_conditions(result: DemoResult) -> None:
    shown = _shown(result)
    row, poisoned = (line for line in shown.splitlines() if "rounded to 2 " in line)
    coarse = result.variants[2]
    for figure in (
        "8.00",
        "256",
        f"{coarse.quality.perplexity:.3f}",
        f"{coarse.quality.kl_mean:.5f}",
        f"{coarse.quality.kl_p99:.4f}",
        f"{coarse.quality.top1:.1%}",
        f"{coarse.recalled / 8:.1%}",
        f"{coarse.tokens_per_second:.0f}",
    ):
        assert figure in row
    assert f"logits moved by {coarse.poison.moved:.3g}; restored exactly" in poisoned
    said = " ".join(notes(result))
    for words in ("chunks of 128", "the token's own included", "every byte held for 256 tokens", "CPU, threads: 1"):
        assert words in said
    assert said.endswith(embedded.CAVEATS[-1])


def test_progress_counts_every_step(loaded: tuple[Any, Any], text: str) -> None:
    steps: list[tuple[str, int, int]] = []
    _run(loaded, text, (variant("fake", 127),), progress=lambda *step: steps.append(step))
    assert [done for _, done, _ in steps] == list(range(len(steps)))
    assert {total for *_, total in steps} == {len(steps)}
    assert steps[0][0] == "poison test: rounded to 127"
    assert steps[1][0] == "text: dense"


def test_progress_bar_shows_the_step() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with progress_bar(console) as progress:
        progress("text: int8", 3, 9)
    assert isinstance(console.file, io.StringIO)
    assert "text: int8" in console.file.getvalue()
    assert "3/9" in console.file.getvalue()


def test_plot_is_written(result: DemoResult, tmp_path: Path) -> None:
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text
        save_plot(result, tmp_path / "kl.svg")
    drawn = (tmp_path / "kl.svg").read_text()
    for words in ("counted bits per element", "mean KL(dense || row), nats", "rounded to 2", "small, read-through"):
        assert words in drawn


def test_threads_are_set_for_the_run_only(loaded: tuple[Any, Any], text: str) -> None:
    seen: set[int] = set()
    settings = SMALL.model_copy(update={"num_threads": 2})
    _run(loaded, text, (), settings=settings, progress=lambda *_: seen.add(torch.get_num_threads()))
    assert seen == {2}
    assert torch.get_num_threads() == 1


def test_standard_variants_pass_on_their_pages(loaded: tuple[Any, Any], text: str) -> None:
    result = _run(loaded, text, standard_variants())
    assert result.passed
    assert [row.name for row in result.variants] == ["raw", "int8", "fp8", "bits4", "bits3", "bits2"]
    kl = [row.quality.kl_mean for row in result.variants]
    assert kl[0] < kl[1] < kl[3] < kl[4] < kl[5]
    assert all(
        row.bits_per_element > nominal for row, nominal in zip(result.variants, (16, 8, 8, 4, 3, 2), strict=True)
    )
    assert [row.nbytes for row in result.variants] == sorted((row.nbytes for row in result.variants), reverse=True)


def test_any_model_directory(loaded: tuple[Any, Any], text: str, tmp_path: Path) -> None:
    config = Qwen2Config(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    loaded[1].save_pretrained(tmp_path)
    int8 = standard_variants()[1]
    result = _run(embedded.load_directory(tmp_path, torch.bfloat16), text, (int8,), caveats=())
    assert result.passed
    assert (result.dtype, result.dense.bits_per_element, result.caveats) == ("bfloat16", 16.0, ())
    assert result.variants[0].quality.kl_mean < 0.01


def test_refuses_windows_beyond_the_models_positions(loaded: tuple[Any, Any], text: str) -> None:
    settings = SMALL.model_copy(update={"window_tokens": 4096})
    with pytest.raises(
        ContractError, match=r"window_tokens: expected at most 4092, the model's positions .*, got 4096"
    ):
        _run(loaded, text, (), settings=settings)


def test_refuses_a_short_text(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(ContractError, match="text: expected at least 512 tokens for 2 windows of 256, got"):
        _run(loaded, "x = 1\n" * 20, ())


@pytest.mark.parametrize("names", [("a", "a"), ("dense",)])
def test_refuses_names_that_would_be_mixed_up(loaded: tuple[Any, Any], text: str, names: tuple[str, ...]) -> None:
    with pytest.raises(ContractError, match="variants: expected different names, none of them 'dense', got"):
        _run(loaded, text, tuple(variant(name, 127) for name in names))
