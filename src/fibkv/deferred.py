"""Sealing in the background, on the CPU: a worker encodes pages while the model goes on and reads their tokens raw."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch

from fibkv.hard_statistics import key_flags, key_statistics
from fibkv.page import Page
from fibkv.sealing import LayerSettings, Span, seal
from fibkv.view import Tail, plain_tensors

BACKLOG_NBYTES = 256 << 20
"""Raw bytes that may wait for the worker of one cache. Layers wait for it to have room for theirs."""

Sealed = tuple[list[list[Page]], tuple[str, ...] | None]
"""The new pages of each row in order, and what is hard about the keys, if that was asked for."""


class Worker:
    """A thread that seals the pages of one cache and its copies, layer by layer, as they come.

    It computes on one thread: those of torch belong to the model.

    Args:
        most_nbytes: raw bytes that may wait for it.
    """

    def __init__(self, most_nbytes: int = BACKLOG_NBYTES) -> None:
        self.most_nbytes = most_nbytes
        self._executor: ThreadPoolExecutor | None = None
        self._room = threading.Condition()
        self._backlog = 0

    def __deepcopy__(self, memo: dict[int, object]) -> Worker:
        return self

    def __reduce__(self) -> tuple[type[Worker], tuple[int]]:
        return Worker, (self.most_nbytes,)

    @property
    def backlog_nbytes(self) -> int:
        """Raw bytes that wait for it or are being encoded."""
        return self._backlog

    def submit(self, work: Callable[[], Sealed], nbytes: int) -> Future[Sealed]:
        """Has work done behind all that was submitted before.

        Args:
            work: what to do.
            nbytes: raw bytes that it encodes, at most `most_nbytes`; waits until there is room for them.
        """
        with self._room:
            self._room.wait_for(lambda: self._backlog + nbytes <= self.most_nbytes)
            self._backlog += nbytes
        future = self._started().submit(work)
        future.add_done_callback(lambda _: self._done(nbytes))
        return future

    def _done(self, nbytes: int) -> None:
        with self._room:
            self._backlog -= nbytes
            self._room.notify_all()

    def _started(self) -> ThreadPoolExecutor:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="fibkv-sealing")
            num_threads = torch.get_num_threads()
            self._executor.submit(_compute_alone).result()
            # The number is a thread's own, and that of threads to come, which the worker has changed.
            torch.set_num_threads(num_threads)
        return self._executor


def _compute_alone() -> None:
    torch.get_num_threads()  # the first call takes over the process's number
    torch.set_num_threads(1)


class DeferredPages:
    """Pages of one layer that a worker is sealing.

    Attributes:
        tail: whose tokens they are of.
        stop: the token of the tail behind the last one of them.
        nbytes: beside those of the tail that are counted: none, before they are taken over.
    """

    nbytes = 0

    def __init__(
        self, tail: Tail, stop: int, future: Future[Sealed], place: Callable[[list[Page]], list[Page]]
    ) -> None:
        self.tail = tail
        self.stop = stop
        self._future = future
        self._place = place

    @property
    def may_wait(self) -> bool:
        """Whether they are not there yet, and nobody needs them: their tokens can be read raw."""
        return not self._future.done()

    def pages(self) -> list[list[Page]] | None:
        """The new pages of each row in order and in their place, waited for; None = they could not be sealed."""
        if self._future.exception() is not None:
            return None
        return [self._place(pages) for pages in self._future.result()[0]]

    def flags(self) -> tuple[str, ...] | None:
        """What is hard about the keys, if that was asked for; to be called behind `pages`."""
        return self._future.result()[1]


def defer(
    settings: LayerSettings,
    tail: Tail,
    length: int,
    spans: Sequence[Span],
    worker: Worker,
    place: Callable[[list[Page]], list[Page]],
    measured: bool,
) -> DeferredPages:
    """Has a worker seal spans of a tail, whose tokens must stay as they are.

    Args:
        settings: of the layer, without a sampler.
        tail: raw tokens ``[B, H, tokens, d]`` on the CPU, the newest ones of the layer.
        length: tokens of the layer, the tail's included.
        spans: page spans relative to the tail, at least one, and not more than the worker may hold.
        worker: who seals.
        place: puts sealed pages in their place, when they are taken over.
        measured: whether the keys of the first pages are looked at, for `DeferredPages.flags`.
    """
    work = partial(_sealed, settings, tail, length, spans, measured)
    return DeferredPages(tail, spans[-1][1], worker.submit(work, raw_nbytes(tail, spans)), place)


def raw_nbytes(tail: Tail, spans: Sequence[Span]) -> int:
    """Bytes of the tokens of spans."""
    tokens = spans[-1][1] - spans[0][0]
    return tokens * sum(t.shape[0] * t.shape[1] * t.shape[3] * t.element_size() for t in (tail.keys, tail.values))


def _sealed(settings: LayerSettings, tail: Tail, length: int, spans: Sequence[Span], measured: bool) -> Sealed:
    with plain_tensors(tail.keys):
        pages = seal(settings, tail, length, spans)
        if not measured:
            return pages, None
        protected = settings.keys.policy.protected.first_tokens_raw
        return pages, key_flags(key_statistics(tail.keys[0, :, protected : spans[0][1]]))
