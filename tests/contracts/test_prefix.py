from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fibkv.errors import ContractError
from fibkv.prefix import chain, chain_names, root

IDS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40)


def test_names_are_the_same_on_every_machine() -> None:
    assert root() == "blake3:2e70a0655069fc50e37303441d077e91b0702f438011376b8b947f4e5908c3ec"
    assert chain(None, [1, 2, 3]) == "blake3:4139984f89186e5b298683acc87eb0f4487092b0a3f9bfe6bd097c347a3cec92"


@given(IDS, IDS)
def test_names_agree_exactly_as_far_as_tokens_do(first: list[int], second: list[int]) -> None:
    length = min(len(first), len(second))
    ours, theirs = (chain_names(None, ids, range(1, length + 1)) for ids in (first, second))
    agree = [first[:stop] == second[:stop] for stop in range(1, length + 1)]
    assert [a == b for a, b in zip(ours, theirs, strict=True)] == agree


def test_a_name_depends_on_what_the_chain_is_bound_to() -> None:
    bound = {root(), root({"model": "a"}), root({"model": "b"})}
    assert len({chain(name, [7]) for name in bound}) == len(bound) == 3
    assert chain(root(), [7]) == chain(None, [7])


def test_names_end_at_their_boundaries() -> None:
    ids = list(range(10))
    assert chain_names(None, ids, [4, 8]) == [chain(None, ids[:4]), chain(chain(None, ids[:4]), ids[4:8])]
    # What is linked in other steps is another chain: who shares names agrees on boundaries.
    assert chain_names(None, ids, [8]) != chain_names(None, ids, [4, 8])[1:]


def test_arrays_count_as_their_numbers() -> None:
    for dtype in (np.int64, np.uint32, np.int32, ">i8"):
        assert chain(None, np.array([1, 500, 70_000], dtype)) == chain(None, [1, 500, 70_000])


@pytest.mark.parametrize("nonsense", [[], [-1], [2**32], [1.5], [[1]], ["a"], [True], None])
def test_nonsense_is_refused(nonsense: object) -> None:
    with pytest.raises(ContractError, match=r"^chain\.token_ids: expected"):
        chain(None, nonsense)  # type: ignore[arg-type]


@pytest.mark.parametrize("boundaries", [[0], [4], [2, 2], [3, 1], [-1]])
def test_boundaries_ascend_within_the_ids(boundaries: list[int]) -> None:
    with pytest.raises(ContractError, match=r"^chain_names\.boundaries: expected more than"):
        chain_names(None, [1, 2, 3], boundaries)
