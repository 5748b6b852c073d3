"""Random operations on the sequences of one pool, from several threads, against a model that is a list of tokens.

A test runs a short one; the long one by hand:

    python -m tests.pool.soak --threads 8 --steps 12500
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import random
import sys
import threading
from collections import deque
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from fibkv.attend import Scores, attend
from fibkv.errors import BudgetError
from fibkv.ladder import Ladder
from fibkv.page import METADATA_NBYTES, Page
from fibkv.pool import Pool
from fibkv.recode import recode
from fibkv.sealing import seal
from fibkv.slabs import Slabs
from fibkv.view import Tail
from tests.pages.helpers import gaussian
from tests.pool.driver import Sequence
from tests.pool.layers import bytes_held, layer_in, rungs

BANK = 512
# |x - decoded| / |x| of whole pages of Gaussian vectors, per rung that they have come down to.
TOLERANCE = {"fp16": 0.0, "q8": 0.02, "q4": 0.25, "q2": 0.6}


class Bank:
    """Token ``i`` has the same key and value wherever it stands."""

    def __init__(self) -> None:
        self.keys, self.values = gaussian(1, 2, BANK, 64, seed=1), gaussian(1, 2, BANK, 64, seed=2)

    def of(self, tokens: Ordered[int]) -> tuple[Tensor, Tensor]:
        where = torch.tensor(tokens, dtype=torch.long)
        return self.keys.index_select(2, where), self.values.index_select(2, where)


@dataclass
class Stream:
    """A sequence, and what it should hold."""

    sequence: Sequence
    tokens: list[int]

    def fork(self, pool: Pool) -> Stream | None:
        """A copy, as `fibkv.Cache.fork` makes one; None if its tail does not fit."""
        try:
            self.sequence.claim.set(self.sequence.layer.tail.nbytes)
        except BudgetError:
            return None
        layer = copy.deepcopy(self.sequence.layer)
        self.sequence.claim.set(0)
        return Stream(Sequence(pool, layer), list(self.tokens))


class Soak:
    """One pool, and threads that work in it."""

    def __init__(self, budget: int, seed: int) -> None:
        self.pool = Pool(budget, ladder=Ladder(q2=("fib2", "fib2")), pages_per_step=2)
        self.bank = Bank()
        self.seed = seed
        self.handed_on: deque[Stream] = deque(maxlen=8)
        self.counts: deque[str] = deque()
        self.errors: deque[BaseException] = deque()
        self.slack: deque[int] = deque()

    def run(self, threads: int, steps: int) -> None:
        """Lets ``threads`` threads take ``steps`` steps each.

        Raises:
            BaseException: the first that any of them met.
        """
        workers = [threading.Thread(target=self._work, args=(index, steps)) for index in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        self.handed_on.clear()
        if self.errors:
            raise self.errors[0]

    def _work(self, index: int, steps: int) -> None:
        try:
            worker = Worker(self, random.Random(1000 * self.seed + index))
            for step in range(steps):
                worker.step()
                if step % 50 == 0:
                    self.slack.append(self.pool.stats().slack)
        except BaseException as error:
            self.errors.append(error)


class Worker:
    """One thread's sequences."""

    def __init__(self, soak: Soak, chance: random.Random) -> None:
        self.soak = soak
        self.pool = soak.pool
        self.chance = chance
        self.streams: list[Stream] = []

    def step(self) -> None:
        """One random operation."""
        if not self.streams or (len(self.streams) < 6 and self.chance.random() < 0.05):
            self.streams.append(Stream(Sequence(self.pool, layer_in(self.pool)), []))
        stream = self.chance.choice(self.streams)
        operations = {self.append: 12, self.crop: 2, self.fork: 1, self.read: 3, self.check: 1, self.drop: 1}
        (operation,) = self.chance.choices(list(operations), list(operations.values()))
        self.soak.counts.append(operation.__name__)
        operation(stream)

    def append(self, stream: Stream) -> None:
        new = [self.chance.randrange(BANK) for _ in range(self.chance.choice([1, 1, 1, 5, 20, 60]))]
        try:
            stream.sequence.append(*self.soak.bank.of(new))
        except BudgetError:
            self.soak.counts.append("refused")
            self.check(stream)
            self.drop(self.chance.choice(self.streams))
        else:
            stream.tokens += new

    def crop(self, stream: Stream) -> None:
        length = self.chance.randrange(len(stream.tokens) + 1)
        stream.sequence.layer.crop(length)
        del stream.tokens[length:]
        self.check(stream)

    def fork(self, stream: Stream) -> None:
        copied = stream.fork(self.pool)
        if copied is not None and self.chance.random() < 0.3:
            self.soak.handed_on.append(copied)
        elif copied is not None and len(self.streams) < 8:
            self.streams.append(copied)
        elif self.soak.handed_on:
            with contextlib.suppress(IndexError):
                self.streams.append(self.soak.handed_on.popleft())

    def read(self, stream: Stream) -> None:
        if stream.tokens:
            out, _ = attend(gaussian(1, 4, 1, 64), stream.sequence.layer.view(), Scores(0.125))
            assert torch.isfinite(out).all()

    def drop(self, stream: Stream) -> None:
        self.streams = [one for one in self.streams if one is not stream]

    def check(self, stream: Stream) -> None:
        """Everything that the sequence holds, against a replay of what its pages went through."""
        layer = stream.sequence.layer
        assert layer.length == len(stream.tokens)
        view = layer.view()
        for page in view.rows[0]:
            self._check_page(stream, page)
        start = view.length - view.tail.length
        keys, values = self.soak.bank.of(stream.tokens[start:])
        assert torch.equal(view.tail.keys[:, :, : view.tail.length], keys)
        assert torch.equal(view.tail.values[:, :, : view.tail.length], values)

    def _check_page(self, stream: Stream, page: Page) -> None:
        entry = self.pool.inventory.entry(page)
        assert entry is not None
        assert entry.path
        keys, values = self.soak.bank.of(stream.tokens[page.start : page.start + page.tokens])
        if page.tokens == 16:  # a crop has gone through shorter ones: their groups were larger
            assert page.digest == replayed(keys, values, page.start, entry.path), entry.path
        for segments, true in ((page.keys, keys), (page.values, values)):
            decoded = torch.empty_like(true[0])
            segments[0].decode(decoded)
            error = (decoded - true[0]).norm() / true.norm()
            assert error <= sum(TOLERANCE[rung] for rung in entry.path), (error, entry.path)


def replayed(keys: Tensor, values: Tensor, start: int, path: Ordered[str]) -> str:
    """Digest of the page that tokens become, one rung after another, on this thread alone."""
    settings = rungs()[path[0]]
    ((page,),) = seal(settings, Tail(keys, values, 16), start + 16, [(0, 16)], start)
    for rung in path[1:]:
        page = recode(page, rungs()[rung], Slabs())
    return page.digest


def check_bytes(soak: Soak, streams: Ordered[Stream]) -> None:
    """Every byte of the pool against what the sequences hold, when nothing else holds pages."""
    stats = soak.pool.stats()
    layers = [stream.sequence.layer for stream in streams]
    pages = {id(page) for layer in layers for page in layer.pages()}
    assert stats.allocated - stats.slack - stats.tables == bytes_held(*layers) + METADATA_NBYTES * len(pages)
    assert sum(row.pages for row in stats.rungs) == len(pages)


def main(arguments: list[str]) -> None:
    """Runs a soak and prints what was done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2000, help="per thread")
    parser.add_argument("--budget", type=int, default=1_500_000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    soak = Soak(chosen.budget, chosen.seed)
    started = perf_counter()
    soak.run(chosen.threads, chosen.steps)
    seconds = perf_counter() - started
    done = {name: soak.counts.count(name) for name in sorted(set(soak.counts))}
    slack = list(soak.slack)
    tenth = max(1, len(slack) // 10)
    print(f"{chosen.threads} threads x {chosen.steps} steps in {seconds:.0f} s: {done}")
    print(f"slack, most in the first and in the last tenth: {max(slack[:tenth])} and {max(slack[-tenth:])} bytes")
    print(f"afterwards: {soak.pool.stats()}")


if __name__ == "__main__":
    main(sys.argv[1:])
