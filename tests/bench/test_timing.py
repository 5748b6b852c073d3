from __future__ import annotations

import gc
from itertools import pairwise

import pytest

from fibkv.errors import ContractError
from fibkv.timing import Timing, interleave, ratio, strongest


def test_timing_is_over_all_calls_of_all_rounds() -> None:
    timing = Timing.of([[0.0, 2.0, 1.0], [3.0, 4.0], [5.0, 6.0, 7.0, 8.0, 9.0, 110.0]])
    assert (timing.p10, timing.median, timing.p90, timing.calls) == (1.0, 5.0, 9.0, 11)
    assert timing.mean == pytest.approx(155 / 11)


def test_quantiles_of_few_calls_are_interpolated() -> None:
    timing = Timing.of([[1.0], [2.0]])
    assert (timing.p10, timing.median, timing.p90) == pytest.approx((1.1, 1.5, 1.9))
    one = Timing.of([[3.0]])
    assert (one.p10, one.median, one.p90, one.mean, one.calls) == (3.0, 3.0, 3.0, 3.0, 1)


def test_timing_refuses_what_is_no_time() -> None:
    with pytest.raises(ContractError, match=r"Timing\.median"):
        Timing.of([[float("nan")]])


def test_a_ratio_is_taken_within_rounds() -> None:
    """The second round ran on a machine ten times slower: medians over all rounds would say 1.5, or 20, or 2.2."""
    slow, fast = [[2.0], [30.0], [2.0]], [[1.0], [10.0], [1.0]]
    assert ratio(slow, fast) == 2.0
    assert ratio(fast, slow) == 0.5
    assert ratio([[1.0, 9.0, 2.0]], [[1.0]]) == 2.0


def test_the_strongest_is_found_by_ratios_within_rounds() -> None:
    """The second wins two rounds of three; the third's medians and means are the least, thanks to one quiet round."""
    first, second, third = [[3.0], [30.0], [3.0]], [[2.0], [20.0], [2.9]], [[2.5], [1.0], [2.95]]
    assert strongest([first, second]) is second
    assert strongest([second, first]) is second
    assert strongest([first, second, third]) is second
    assert strongest([]) is None


def test_contenders_take_turns_in_orders_drawn_anew() -> None:
    def orders(num_rounds: int) -> tuple[list[str], dict[str, list[list[float]]], list[int]]:
        calls: list[str] = []
        said: list[int] = []

        def contender(name: str) -> list[float]:
            calls.append(name)
            return [float(len(calls))]

        taken = interleave({name: lambda name=name: contender(name) for name in "abc"}, num_rounds, said.append)
        return calls, taken, said

    calls, taken, said = orders(30)
    assert said == list(range(30))
    assert all(sorted(calls[start : start + 3]) == ["a", "b", "c"] for start in range(0, 90, 3))
    assert taken["a"] == [[place + 1.0] for place, name in enumerate(calls) if name == "a"]
    # Everyone comes after everyone else; the orders of another run are the same.
    followed = {(before, after) for before, after in pairwise(calls) if before != after}
    assert len(followed) == 6
    assert orders(30)[0] == calls


def test_no_garbage_is_collected_during_the_rounds() -> None:
    assert gc.isenabled()
    states: list[bool] = []
    interleave({"a": lambda: [float(states.append(gc.isenabled()) is None)]}, 1, lambda _: None)
    assert states == [False]
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        interleave({"a": lambda: [1 / 0]}, 1, lambda _: None)
    assert gc.isenabled()
