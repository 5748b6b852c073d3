import time
from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fibkv.errors import ContractError, DecisionError
from fibkv.policy import Decision, Plan, Policy, Run, Strategy, decide, plan
from fibkv.regions import ProtectedRegions
from fibkv.shape import KVShape

from .examples import KEY_SHAPE, VALUE_SHAPE

PROTECTED = ProtectedRegions(first_tokens_raw=2, last_tokens_raw=1, raw_layers=(1,), raw_heads=(1,))


def policy(strategy: str, **fields: object) -> Policy:
    return Policy.raw().model_copy(update={"strategy": strategy, **fields})


def test_presets() -> None:
    nothing = ProtectedRegions()
    assert Policy.raw() == Policy(strategy="raw", protected=nothing, require_calibration=False, allow_raw_fallback=True)
    assert Policy.role_aware_baseline() == Policy(
        strategy="role_aware_kivi_style_baseline",
        protected=ProtectedRegions(last_tokens_raw=1),
        require_calibration=False,
        allow_raw_fallback=True,
    )
    assert Policy.per_token().protected == nothing
    assert Policy.per_token(protected=PROTECTED) == policy("fib_quant_per_token", protected=PROTECTED)


KEY_TABLE = {
    "raw": ("keep_raw", "raw", "raw_strategy"),
    "fib_quant_per_token": ("compress", "per_token", "key_role_axis"),
    "fib_quant_per_channel": ("compress", "per_channel", "key_role_axis"),
    "role_aware_kivi_style_baseline": ("compress", "per_channel", "key_role_axis"),
    "experimental_fib_quant_role_aware": ("compress", "per_channel", "experimental_role_aware"),
}
VALUE_TABLE = {
    "raw": ("keep_raw", "raw", "raw_strategy"),
    "fib_quant_per_token": ("compress", "per_token", "value_role_axis"),
    "fib_quant_per_channel": ("compress", "per_channel", "value_role_axis"),
    "role_aware_kivi_style_baseline": ("compress", "per_token", "value_role_axis"),
    "experimental_fib_quant_role_aware": ("compress", "per_token", "experimental_role_aware"),
}


def test_tables_know_every_strategy() -> None:
    assert set(KEY_TABLE) == set(VALUE_TABLE) == set(get_args(Strategy))


@pytest.mark.parametrize("strategy", KEY_TABLE)
@pytest.mark.parametrize(("shape", "table"), [(KEY_SHAPE, KEY_TABLE), (VALUE_SHAPE, VALUE_TABLE)])
def test_strategies(shape: KVShape, table: dict[str, tuple[str, str, str]], strategy: str) -> None:
    action, axis, reason = table[strategy]
    decision = decide(policy(strategy), shape, 0, 0, 3, has_calibration=True, block_dim=2)
    assert decision.model_dump() == {"action": action, "axis": axis, "reasons": (reason,)}


@pytest.mark.parametrize("strategy", KEY_TABLE)
@pytest.mark.parametrize(("layer", "head", "token"), [(0, 0, 0), (0, 0, 15), (1, 0, 5), (0, 1, 5)])
def test_protection_comes_before_everything(strategy: str, layer: int, head: int, token: int) -> None:
    strict = policy(strategy, protected=PROTECTED, require_calibration=True, allow_raw_fallback=False)
    decision = decide(strict, KEY_SHAPE, layer, head, token, has_calibration=False, block_dim=3)
    assert decision == Decision(action="keep_raw", axis="raw", reasons=("protected_region",))


@pytest.mark.parametrize("strategy", KEY_TABLE)
@pytest.mark.parametrize(("fallback", "action"), [(True, "keep_raw"), (False, "need_calibration")])
def test_missing_calibration_comes_before_the_strategy(strategy: str, fallback: bool, action: str) -> None:
    careful = policy(strategy, require_calibration=True, allow_raw_fallback=fallback)
    decision = decide(careful, KEY_SHAPE, 0, 0, 3, has_calibration=False, block_dim=3)
    assert decision.model_dump() == {"action": action, "axis": "raw", "reasons": ("calibration_missing",)}
    assert decide(careful, KEY_SHAPE, 0, 0, 3, has_calibration=True).reasons != ("calibration_missing",)


@pytest.mark.parametrize("block_dim", [0, 3, 64, 128])
@pytest.mark.parametrize("strategy", [name for name in KEY_TABLE if name != "raw"])
def test_unsupported_shape_is_kept_raw_or_refused(strategy: str, block_dim: int) -> None:
    decision = decide(policy(strategy), KEY_SHAPE, 0, 0, 3, has_calibration=False, block_dim=block_dim)
    assert decision == Decision(action="keep_raw", axis="raw", reasons=("unsupported_shape",))
    strict = policy(strategy, allow_raw_fallback=False)
    message = f"strategy {strategy} cannot carry head_dim 64 in blocks of {block_dim}: expected a divisor"
    with pytest.raises(DecisionError, match=message):
        decide(strict, KEY_SHAPE, 0, 0, 3, has_calibration=False, block_dim=block_dim)
    with pytest.raises(DecisionError, match=message):
        plan(strict, KEY_SHAPE, has_calibration=False, block_dim=block_dim)


def test_raw_carries_every_shape() -> None:
    strict = policy("raw", allow_raw_fallback=False)
    assert decide(strict, KEY_SHAPE, 0, 0, 3, has_calibration=False, block_dim=3).reasons == ("raw_strategy",)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ((2, 0, 0), r"decide\.layer: expected an index from 0 to 1, got 2"),
        ((0, 2, 0), r"decide\.head: expected an index from 0 to 1, got 2"),
        ((0, 0, 16), r"decide\.token: expected an index from 0 to 15, got 16"),
        ((-1, 0, 0), r"decide\.layer: expected an index from 0 to 1, got -1"),
        ((2, 2, 16), r"decide\.layer: "),
    ],
)
def test_index_outside_the_shape_is_refused(index: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ContractError, match=f"^{message}"):
        decide(Policy.raw(), KEY_SHAPE, *index, has_calibration=False)


def test_regions_are_checked_before_the_index() -> None:
    outside = Policy.per_token(ProtectedRegions(raw_heads=(2,)))
    with pytest.raises(ContractError, match=r"^ProtectedRegions\.raw_heads: expected KV heads below 2, got 2$"):
        decide(outside, KEY_SHAPE, 9, 9, 99, has_calibration=False)
    with pytest.raises(ContractError, match=r"^ProtectedRegions\.raw_heads: "):
        plan(outside, KEY_SHAPE, has_calibration=False)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Policy, KVShape, bool, int | None]:
    layers, heads, tokens = (draw(st.integers(1, top)) for top in (4, 3, 9))
    shape = KEY_SHAPE.model_copy(
        update={"layers": layers, "kv_heads": heads, "query_heads": heads, "tokens": tokens, "head_dim": 8}
    )
    if draw(st.booleans()):
        shape = shape.model_copy(update={"role": "value", "rope_state": "not_applicable"})
    regions = ProtectedRegions(
        first_tokens_raw=draw(st.integers(0, tokens)),
        last_tokens_raw=draw(st.integers(0, tokens)),
        raw_layers=tuple(draw(st.lists(st.integers(0, layers - 1), max_size=3))),
        raw_heads=tuple(draw(st.lists(st.integers(0, heads - 1), max_size=2))),
    )
    drawn = Policy(
        strategy=draw(st.sampled_from(get_args(Strategy))),
        protected=regions,
        require_calibration=draw(st.booleans()),
        allow_raw_fallback=draw(st.booleans()),
    )
    return drawn, shape, draw(st.booleans()), draw(st.sampled_from([None, 2, 3, 8]))


@given(cases())
def test_plan_equals_decide_at_every_index(case: tuple[Policy, KVShape, bool, int | None]) -> None:
    drawn, shape, has_calibration, block_dim = case
    indices = [
        (layer, head, token)
        for layer in range(shape.layers)
        for head in range(shape.kv_heads)
        for token in range(shape.tokens)
    ]
    try:
        expected = {index: decide(drawn, shape, *index, has_calibration, block_dim) for index in indices}
    except DecisionError:
        with pytest.raises(DecisionError, match="cannot carry head_dim 8"):
            plan(drawn, shape, has_calibration, block_dim)
        return
    made = plan(drawn, shape, has_calibration, block_dim)
    covered = [(index, run.decision) for run in made.runs for index in inside(run)]
    # As a list first: a vector in two runs would vanish in a dict.
    assert len(covered) == len(indices)
    assert dict(covered) == expected
    assert_maximal(made)
    for layer in range(shape.layers):
        start, stop = sorted((layer % (shape.tokens + 1), shape.tokens // 2))
        clipped = made.clip(layer, start, stop)
        assert [run.layers for run in clipped] == [(layer, layer + 1)] * len(clipped)
        cells = [(index, run.decision) for run in clipped for index in inside(run)]
        assert len(cells) == shape.kv_heads * (stop - start)
        assert all(expected[index] == decision and start <= index[2] < stop for index, decision in cells)
        assert clipped == tuple(sorted(clipped, key=lambda run: (run.heads, run.tokens)))


def inside(run: Run) -> list[tuple[int, int, int]]:
    return [
        (layer, head, token)
        for layer in range(*run.layers)
        for head in range(*run.heads)
        for token in range(*run.tokens)
    ]


def assert_maximal(made: Plan) -> None:
    """No two neighbouring runs, layers or heads could have been one."""
    for before, after in pairwise(made.runs):
        if (before.layers, before.heads) == (after.layers, after.heads):
            assert before.decision != after.decision
    assert_neighbours_differ([(run.layers, (run.heads, run.tokens, run.decision)) for run in made.runs])
    for layers in {run.layers for run in made.runs}:
        assert_neighbours_differ([(r.heads, (r.tokens, r.decision)) for r in made.runs if r.layers == layers])


def assert_neighbours_differ(parts: list[tuple[tuple[int, int], object]]) -> None:
    contents: dict[tuple[int, int], list[object]] = {}
    for span, content in parts:
        contents.setdefault(span, []).append(content)
    ordered = [contents[span] for span in sorted(contents)]
    assert all(before != after for before, after in pairwise(ordered))


def test_runs_of_the_baseline() -> None:
    made = plan(Policy.role_aware_baseline(), KEY_SHAPE, has_calibration=False)
    assert [(run.layers, run.heads, run.tokens, run.decision.action) for run in made.runs] == [
        ((0, 2), (0, 2), (0, 15), "compress"),
        ((0, 2), (0, 2), (15, 16), "keep_raw"),
    ]


def test_overlapping_protections_make_one_run() -> None:
    protected = ProtectedRegions(first_tokens_raw=10, last_tokens_raw=10)
    made = plan(Policy.per_token(protected), KEY_SHAPE, has_calibration=False)
    assert [run.tokens for run in made.runs] == [(0, 16)]


def test_clip() -> None:
    made = plan(Policy.per_token(PROTECTED), KEY_SHAPE, has_calibration=False)
    assert [(run.layers, run.heads, run.tokens, run.decision.action) for run in made.clip(0, 1, 8)] == [
        ((0, 1), (0, 1), (1, 2), "keep_raw"),
        ((0, 1), (0, 1), (2, 8), "compress"),
        ((0, 1), (1, 2), (1, 8), "keep_raw"),
    ]
    assert [(run.layers, run.heads, run.tokens) for run in made.clip(1, 4, 8)] == [((1, 2), (0, 2), (4, 8))]
    assert made.clip(0, 5, 5) == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 0, 1), r"Plan\.clip\.layer: expected an index from 0 to 1, got 2"),
        ((0, -1, 1), r"Plan\.clip\.tokens: expected 0 <= start <= stop <= 16, got \(-1, 1\)"),
        ((0, 0, 17), r"Plan\.clip\.tokens: expected 0 <= start <= stop <= 16, got \(0, 17\)"),
        ((0, 3, 2), r"Plan\.clip\.tokens: expected 0 <= start <= stop <= 16, got \(3, 2\)"),
    ],
)
def test_clip_outside_the_shape_is_refused(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ContractError, match=f"^{message}$"):
        plan(Policy.raw(), KEY_SHAPE, has_calibration=False).clip(*arguments)


def test_a_million_tokens_cost_no_more_than_a_few() -> None:
    shape = KEY_SHAPE.model_copy(
        update={"layers": 80, "kv_heads": 8, "query_heads": 64, "tokens": 1_000_000, "head_dim": 128}
    )
    regions = ProtectedRegions(first_tokens_raw=4, last_tokens_raw=128, raw_layers=(0, 40, 79), raw_heads=(3,))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        made = plan(Policy.per_token(regions), shape, has_calibration=False, block_dim=2)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.010
    vectors = sum(len(range(*r.layers)) * len(range(*r.heads)) * len(range(*r.tokens)) for r in made.runs)
    assert vectors == 80 * 8 * 1_000_000
