"""The kernel benchmark: its rows are complete, its ratios right, and its checks fail where they should."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fibkv import bench_kernels
from fibkv.bench_contenders import BASELINES, Contender, exact, paged
from fibkv.bench_forms import DenseForm, Form, PagedForm
from fibkv.bench_kernels import chosen_implementations, run_kernels
from fibkv.bench_result import ATTENTION_LIMIT, KernelResult, KernelRow
from fibkv.bench_settings import QUICK_KERNELS
from fibkv.codes import Codes
from fibkv.errors import KernelError
from fibkv.packed import Packed
from tests.bench.conftest import quiet

(AUTOMATIC,) = chosen_implementations(("auto",))
SMALL = QUICK_KERNELS.model_copy(update={"contexts": (256,), "profiles": ("int8",), "rounds": 1})


def _rows(result: KernelResult, context: int) -> dict[str, KernelRow]:
    return {row.name: row for row in result.rows if row.context == context}


@pytest.mark.parametrize("context", QUICK_KERNELS.contexts)
def test_every_contender_has_its_figures_at_every_context(kernel_result: KernelResult, context: int) -> None:
    assert kernel_result.passed
    rows = _rows(kernel_result, context)
    assert list(rows) == [*BASELINES, *(f"{profile} {AUTOMATIC}" for profile in QUICK_KERNELS.profiles)]
    for row in rows.values():
        figures = row.figures
        assert figures is not None
        assert figures.timing.calls == figures.read.calls == QUICK_KERNELS.rounds
        assert figures.ns_per_token == pytest.approx(1e9 * figures.timing.median / (context * QUICK_KERNELS.kv_heads))
        assert figures.gigabytes_per_second == pytest.approx(row.nbytes / figures.timing.median / 1e9)


def test_ratios_are_to_the_strongest_baseline(kernel_result: KernelResult) -> None:
    for context in QUICK_KERNELS.contexts:
        ratios = [row.figures.speedup for row in _rows(kernel_result, context).values() if row.figures]
        assert 1.0 in ratios[: len(BASELINES)]
        assert all(ratio is not None and ratio > 0 for ratio in ratios)


def test_sizes_are_counted(kernel_result: KernelResult) -> None:
    rows = _rows(kernel_result, 256)
    elements = 2 * 2 * 256 * 64  # keys and values, heads, tokens, head_dim
    for row in rows.values():
        assert row.bytes_per_element == row.nbytes / elements
    sizes = [row.bytes_per_element for row in rows.values()]
    assert sizes[: len(BASELINES)] == [2.0] * len(BASELINES)
    fib4, fib2, int8, fp8, raw = sizes[len(BASELINES) :]
    # int8 tiles are padded where sinks leave a short page; fp8 rows are not.
    assert fib2 < fib4 < fp8 <= int8 < 1.02 * fp8 < 2 < raw


def test_result_round_trips_through_json(kernel_result: KernelResult) -> None:
    assert KernelResult.from_json(kernel_result.to_json()) == kernel_result


def test_progress_counts_every_step() -> None:
    steps: list[tuple[str, int, int]] = []
    run_kernels(SMALL, lambda *step: steps.append(step))
    assert [done for _, done, _ in steps] == list(range(len(steps)))
    assert {total for *_, total in steps} == {len(steps)}
    assert steps[-1][0] == "256 tokens: round 1 of 1"


def test_a_chunk_of_queries() -> None:
    """Each sees all of the context: the checks hold every output to that."""
    result = run_kernels(SMALL.model_copy(update={"profiles": ("int8", "raw"), "queries": 40}), quiet)
    assert result.passed
    assert all(0 < row.checks.error < ATTENTION_LIMIT for row in result.rows)


def test_pairs_and_batches() -> None:
    result = run_kernels(SMALL.model_copy(update={"profiles": ("int8/fib4",), "batch": 2}), quiet)
    assert result.passed
    assert [row.name for row in result.rows if row.kind == "fibkv"] == [f"int8/fib4 {AUTOMATIC}"]


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_are_attention(name: str) -> None:
    query, keys, values = torch.randn(2, 6, 1, 16), torch.randn(2, 3, 40, 16), torch.randn(2, 3, 40, 16)
    expected = scaled_dot_product_attention(
        query.double(), keys.repeat_interleave(2, 1).double(), values.repeat_interleave(2, 1).double(), scale=0.3
    )
    assert torch.allclose(BASELINES[name](query, keys, values, 0.3).double(), expected, atol=1e-5)
    assert torch.allclose(exact(query, keys, values, 0.3), expected, atol=1e-12)


def test_a_contender_that_returns_garbage_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage is faster than anything else, and must not become the yardstick either."""
    monkeypatch.setitem(BASELINES, "bf16 matmul", lambda query, keys, values, scale: values[:, :1, :1].expand_as(query))
    rows = _rows(run_kernels(SMALL, quiet), 256)
    assert not rows["bf16 matmul"].checks.passed
    assert rows["bf16 matmul"].checks.error > 0.5
    assert rows["bf16 matmul"].figures is None
    others = [row.figures for name, row in rows.items() if name != "bf16 matmul"]
    assert all(figures is not None and figures.speedup is not None for figures in others)
    assert any(figures.speedup == 1.0 for figures in others if figures)


def test_an_output_that_is_not_finite_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BASELINES, "bf16 matmul", lambda query, *_: query * torch.nan)
    result = run_kernels(SMALL, quiet)
    assert not result.passed
    assert _rows(result, 256)["bf16 matmul"].figures is None
    assert KernelResult.from_json(result.to_json()) == result


def test_without_a_right_baseline_there_are_no_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BASELINES:
        monkeypatch.setitem(BASELINES, name, lambda query, *_: query)
    (row,) = (row for row in run_kernels(SMALL, quiet).rows if row.kind == "fibkv")
    assert row.checks.passed
    assert row.figures is not None
    assert row.figures.speedup is None


def _replaced(
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Callable[[Tensor, Any], Tensor]], Callable[[Tensor, Any], Tensor]],
) -> None:
    """Makes the benchmark use a changed attention on pages."""

    def changed(profile: str, form: PagedForm, scale: float, implementation: str) -> Contender[Any]:
        honest = paged(profile, form, scale, implementation)
        return Contender(honest.name, honest.kind, honest.form, change(honest.attend))

    monkeypatch.setattr(bench_kernels, "paged", changed)


def test_a_cache_that_is_not_read_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers rightly, from its first look at the pages: nothing but the poison test sees that."""

    def remembering(attend: Callable[[Tensor, Any], Tensor]) -> Callable[[Tensor, Any], Tensor]:
        answers: list[Tensor] = []

        def answer(query: Tensor, held: Any) -> Tensor:
            if not answers:
                answers.append(attend(query, held))
            return answers[0]

        return answer

    _replaced(monkeypatch, remembering)
    result = run_kernels(SMALL, quiet)
    (row,) = (row for row in result.rows if row.kind == "fibkv")
    assert row.checks.error < ATTENTION_LIMIT
    assert (row.checks.poison.moved, row.checks.poison.restored) == (0.0, True)
    assert row.figures is None
    assert not result.passed


def test_a_run_in_which_nothing_is_right_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BASELINES:
        monkeypatch.setitem(BASELINES, name, lambda query, *_: query)
    _replaced(monkeypatch, lambda attend: lambda query, held: query)
    result = run_kernels(SMALL, quiet)
    assert not result.passed
    assert {row.figures for row in result.rows} == {None}


def test_a_contender_that_cuts_corners_when_it_is_timed_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def tiring(attend: Callable[[Tensor, Any], Tensor]) -> Callable[[Tensor, Any], Tensor]:
        calls: list[int] = []

        def answer(query: Tensor, held: Any) -> Tensor:
            calls.append(1)
            # Three calls of the checks and one to warm up are honest.
            return attend(query, held) if len(calls) <= 4 else torch.zeros_like(query)

        return answer

    _replaced(monkeypatch, tiring)
    (row,) = (row for row in run_kernels(SMALL, quiet).rows if row.kind == "fibkv")
    assert row.checks.poison.passed
    assert row.checks.error == 1.0
    assert row.figures is None


def test_implementations_are_chosen_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"gone": "not built", "fast": "yes", "reference": "yes"}
    monkeypatch.setattr("fibkv.kernels.available", lambda: states)
    assert chosen_implementations(("auto",)) == ("fast",)
    assert chosen_implementations(("reference", "auto", "fast")) == ("reference", "fast")
    with pytest.raises(KernelError, match="expected one of gone: not built, fast: yes, reference: yes; got 'gone'"):
        chosen_implementations(("auto", "gone"))
    with pytest.raises(KernelError, match="got 'other'"):
        chosen_implementations(("other",))


@pytest.fixture(params=["dense", "paged"])
def form(request: pytest.FixtureRequest) -> Form[Any]:
    keys, values = torch.randn(2, 1, 2, 256, 64).bfloat16()
    return DenseForm(keys, values) if request.param == "dense" else PagedForm.fill(keys, values, "fib4", 4)


def _tensors(held: Any) -> list[Tensor]:
    if isinstance(held, tuple):
        return list(held)
    segments = [segment for page in held.rows[0] for segment in (*page.keys, *page.values)]
    return [_memory(segment.held) for segment in segments] + [held.tail.keys, held.tail.values]


def _memory(held: Codes | Packed) -> Tensor:
    return held.data if isinstance(held, Packed) else next(held.named())[1]


def _decoded(held: Any) -> tuple[Tensor, Tensor]:
    return held if isinstance(held, tuple) else held.decode(torch.float32)


def test_copies_share_no_memory_and_take_turns(form: Form[Any]) -> None:
    form.copy(3)
    form.copy(2)
    held = list(form)
    assert len(held) == 3
    assert held[0] is form.first
    pointers = [tensor.data_ptr() for copy in held for tensor in _tensors(copy) if tensor.numel()]
    assert len(set(pointers)) == len(pointers)
    for copy in held[1:]:
        assert all(torch.equal(*pair) for pair in zip(_decoded(copy), _decoded(held[0]), strict=True))
    assert [id(form.take()) for _ in range(4)] == [id(copy) for copy in (*held, held[0])]


def test_damage_is_to_the_keys_and_is_mended(form: Form[Any]) -> None:
    keys, values = (tensor.clone() for tensor in form.decoded())
    with form.damaged():
        damaged, same = form.decoded()
        assert (damaged != keys).any(-1).sum() > 32
        assert torch.equal(same, values)
    assert torch.equal(form.decoded()[0], keys)
