"""Steps of attention on Triton are decided once: for what, for how long, and that nothing of them is ever stale."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from fibkv import kernels
from fibkv.attend import Scores, attend
from fibkv.cache import LayerCache
from fibkv.kernels import triton
from fibkv.kernels.triton_tuning import Tuning, Tunings
from fibkv.view import View
from tests.codecs.conformance import attend_error, gaussian
from tests.codecs.test_native import check, dense, filled

pytestmark = pytest.mark.skipif(triton.why_not("cpu") != "yes", reason=f"triton: {triton.why_not('cpu')}")

SCORES = Scores(0.125)
ERROR = attend_error("triton", "fib4")


def layer(batch: int = 1) -> LayerCache:
    """One head: the interpreter takes its time."""
    return filled(("fib4", "fib4"), "reference", batch=batch, heads=1, tokens=40)


def plan_of(view: View) -> Any:
    return view.rows.plan(kernels.resolve("triton"))


def steps_of(view: View) -> int:
    return len(plan_of(view)._steps)


def test_decoding_decides_once_until_pages_change() -> None:
    cache, query, plans = layer(), gaussian(1, 2, 1, 64, seed=2), []
    for seed in range(5):
        # From 38 tokens of pages on, the second of these fills one.
        new = gaussian(1, 1, 7, 64, seed=10 + seed)
        view = cache.append(new[:, :, :1], new[:, :, :1])
        attend(query, view, SCORES, implementation="triton")
        view = cache.append(new[:, :, 1:], new[:, :, 1:])
        check(cache, query, SCORES, ERROR, "triton")
        plans.append(plan_of(cache.view()))
        assert steps_of(cache.view()) == 1
    assert 1 < len(set(map(id, plans))) < len(plans)


def test_what_a_step_is_decided_by() -> None:
    """One plan, steps of many kinds by turns: each is right, whatever came before it."""
    cache = layer()
    mask = torch.rand(1, 1, 3, 40, generator=torch.Generator().manual_seed(0)) > 0.4
    kinds = [
        (1, SCORES),
        (3, SCORES),
        (3, Scores(0.125, causal=False)),
        (3, Scores(0.125, mask=mask)),
        (3, Scores(0.125, mask=mask.float())),
        (3, Scores(0.25, softcap=2.0)),
    ]
    for queries, scores in [*kinds, *reversed(kinds)]:
        check(cache, gaussian(1, 2, queries, 64, seed=queries), scores, ERROR, "triton")
    assert steps_of(cache.view()) == len(kinds)
    attend(gaussian(1, 1, 1, 64).half(), cache.view(), SCORES, implementation="triton")
    assert steps_of(cache.view()) == len(kinds) + 1


def test_a_plan_keeps_few_steps() -> None:
    from fibkv.kernels import triton_step  # noqa: PLC0415 - imports triton

    view = layer().view()
    for queries in range(1, triton_step.MOST_STEPS + 3):
        attend(gaussian(1, 1, queries, 64), view, SCORES, implementation="triton")
        assert steps_of(view) <= triton_step.MOST_STEPS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outputs_of_halves_are_those_of_float32_rounded(dtype: torch.dtype) -> None:
    view, query = layer().view(), gaussian(1, 2, 1, 64, seed=2).to(dtype)
    wide, _ = attend(query.float(), view, SCORES, implementation="triton")
    assert torch.equal(attend(query, view, SCORES, implementation="triton")[0], wide.to(dtype))


@pytest.mark.parametrize("pair", [("fib4", "fib4"), ("int8", "int8")])
def test_queries_in_float64(pair: tuple[str, str]) -> None:
    """Kernels read none: they are made float32, outputs are not."""
    cache = filled(pair, "reference", batch=1, heads=1, tokens=20)
    query = gaussian(1, 2, 1, 64, seed=2).double()
    out, _ = attend(query, cache.view(), SCORES, implementation="triton")
    assert out.dtype == torch.float64
    check(cache, query, SCORES, attend_error("triton", *pair), "triton")


def test_crops_and_selections_are_planned_anew() -> None:
    cache, query = layer(batch=2), gaussian(2, 2, 1, 64, seed=2)
    check(cache, query, SCORES, ERROR, "triton")
    first = plan_of(cache.view())
    cache.select([1, 0])
    check(cache, query, SCORES, ERROR, "triton")
    cache.crop(21)
    check(cache, query, SCORES, ERROR, "triton")
    cache.select([0, 0, 1])
    check(cache, gaussian(3, 2, 1, 64, seed=2), SCORES, ERROR, "triton")
    assert plan_of(cache.view()) is not first


def test_tails_of_other_sizes_on_the_same_pages() -> None:
    """A fork goes on in a tail of its own; both read the same pages."""
    cache, query = layer(), gaussian(1, 2, 1, 64, seed=2)
    view = cache.view()
    longer = View(view.rows, view.tail.kept(0, view.tail.length, 100), view.length)
    for one in (view, longer, view):
        out, _ = attend(query, one, SCORES, implementation="triton")
        expected, _ = dense(query, one, SCORES)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=ERROR)
    assert steps_of(view) == 2


def test_kernels_with_other_tunings_have_plans_of_their_own() -> None:
    view, query = layer().view(), gaussian(1, 2, 1, 64, seed=2)
    tuned = triton.Triton("cpu", Tunings(device="interpreter", found=(("f321", Tuning(tokens=16)),)))
    tail = view.tail.keys, view.tail.values, view.tail.length
    tiles = []
    for one in (kernels.resolve("triton"), tuned):
        plan = view.rows.plan(one)
        one.attend_plan(query, plan, tail, SCORES, length=view.length)
        (step,) = plan._steps.values()
        tiles.append(step.tail.tile)
    assert tiles == [32, 16]


def test_plans_die_with_their_pages() -> None:
    from fibkv.kernels import triton_plan  # noqa: PLC0415 - imports triton

    gc.collect()
    known = len(triton_plan._known)
    cache = layer()
    attend(gaussian(1, 1, 1, 64), cache.view(), SCORES, implementation="triton")
    plan = weakref.ref(plan_of(cache.view()))
    codes = weakref.ref(next(iter(cache.pages())).held[0])
    assert len(triton_plan._known) > known
    new = gaussian(1, 1, 20, 64)
    cache.append(new, new)
    assert plan() is None
    assert codes() is not None
    del cache
    gc.collect()
    assert codes() is None
    assert len(triton_plan._known) == known
