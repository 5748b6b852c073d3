"""Ranges against a model that is a plain set of intervals, and memory against what the kernel says exists."""

from __future__ import annotations

import random

import pytest
import torch

from fibkv.ranges import HUGE_GRAIN, SHARED_REGION, SMALL_GRAIN, Ranges, Taken
from fibkv.slabs import Lanes, Slabs
from tests.pool.memory import resident_nbytes


class Model:
    """What is taken, and nothing cleverer than that."""

    def __init__(self) -> None:
        self.taken: list[Taken] = []

    def add(self, new: Taken) -> None:
        for old in self.taken:
            apart = (
                old.region != new.region or old.start + old.nbytes <= new.start or new.start + new.nbytes <= old.start
            )
            assert apart, (old, new)
        self.taken.append(new)

    def allocated(self) -> int:
        grains = set()
        for one in self.taken:
            first, last = one.start // SMALL_GRAIN, (one.start + one.nbytes - 1) // SMALL_GRAIN
            grains |= {(one.region, grain) for grain in range(first, last + 1)}
        return SMALL_GRAIN * len(grains)


def check(ranges: Ranges, model: Model) -> None:
    assert ranges.used == sum(one.nbytes for one in model.taken)
    assert ranges.allocated == model.allocated()


@pytest.mark.parametrize("seed", range(4))
def test_ranges_are_apart_and_counted(seed: int) -> None:
    chance = random.Random(seed)
    ranges, model = Ranges(), Model()
    for _ in range(1500):
        if model.taken and chance.random() < 0.48:
            one = model.taken.pop(chance.randrange(len(model.taken)))
            if one.nbytes > 64 and chance.random() < 0.3:  # blocks that were taken together come back one by one
                head = one.nbytes // 128 * 64 or 64
                ranges.give(Taken(one.region, one.start, head))
                model.taken.append(Taken(one.region, one.start + head, one.nbytes - head))
            else:
                ranges.give(one)
        else:
            model.add(ranges.take(64 * chance.choice([1, 3, 17, 64, 200, 1000])))
        if chance.random() < 0.05:
            check(ranges, model)
    for one in model.taken:
        ranges.give(one)
    assert (ranges.used, ranges.allocated, ranges.regions) == (0, 0, 0)


def test_released_grains_are_those_that_nothing_touches() -> None:
    ranges = Ranges()
    first, second, third = (ranges.take(9000) for _ in range(3))
    assert [one.start for one in (first, second, third)] == [0, 9000, 18000]
    # 9000..18000 lie in grains 2, 3 and 4: the first range reaches into grain 2, the third starts in grain 4.
    released = ranges.give(second)
    assert released is not None
    assert (released.start, released.nbytes) == (3 * SMALL_GRAIN, SMALL_GRAIN)
    released = ranges.give(first)
    assert released is not None
    assert (released.start, released.nbytes) == (0, 3 * SMALL_GRAIN)
    assert ranges.allocated == 3 * SMALL_GRAIN
    released = ranges.give(third)
    assert released is not None
    assert released.nbytes == 0, "the whole region"


def test_large_requests_have_regions_of_their_own() -> None:
    ranges = Ranges()
    small, large = ranges.take(64), ranges.take(HUGE_GRAIN + 64)
    assert ranges.form_of(small.region).size == SHARED_REGION
    assert not ranges.form_of(small.region).huge
    assert ranges.form_of(large.region).huge
    assert ranges.allocated == SMALL_GRAIN + HUGE_GRAIN + SMALL_GRAIN


def test_holes_are_filled_best_fit_first() -> None:
    ranges = Ranges()
    blocks = [ranges.take(nbytes) for nbytes in (64, 640, 64, 1280, 64)]
    ranges.give(blocks[3])
    ranges.give(blocks[1])
    assert ranges.take(512).start == blocks[1].start
    assert ranges.take(1280).start == blocks[3].start


def test_the_kernel_agrees_on_what_exists() -> None:
    slabs = Slabs()
    before = resident_nbytes()
    blocks = [block for _ in range(40) for block in slabs.take(100_000, 20)]
    for block in blocks:
        block.fill_(1)
    assert slabs.allocated_nbytes >= 80_000_000
    assert abs(resident_nbytes() - before - slabs.allocated_nbytes) < 4 << 20
    del block
    for index in range(0, len(blocks), 2):  # every second one: no region is free, half of the memory must be
        blocks[index] = torch.empty(0)
    assert slabs.used_nbytes == 400 * 100_032
    assert slabs.slack_nbytes < 400 * 2 * SMALL_GRAIN
    assert abs(resident_nbytes() - before - slabs.allocated_nbytes) < 4 << 20
    blocks.clear()
    assert slabs.allocated_nbytes == 0
    assert resident_nbytes() - before < 4 << 20


def test_blocks_of_a_lane_follow_one_another() -> None:
    ahead: list[list[int]] = []
    lanes = Lanes(Slabs(), 3, blocks=10, taken=lambda taken: ahead.extend([one.data_ptr() for one in x] for x in taken))
    rounds = [lanes.take(256, 6) for _ in range(5)]  # two blocks for each lane
    blocks = [block for one in rounds for block in one]
    assert len({block.data_ptr() for block in blocks}) == 30
    assert all(block.shape == (256,) for block in blocks)
    # The first round is one of a kind, for all that is known then.
    for lane in range(3):
        addresses = [block.data_ptr() for one in rounds[1:] for block in one[2 * lane : 2 * lane + 2]]
        assert [address - addresses[0] for address in addresses] == [256 * index for index in range(8)]
        assert ahead[lane] == addresses
    assert len(lanes.take(256, 2)) == 2  # not for every lane
    assert len(lanes.take(256, 3)) == 3  # more than was foreseen
