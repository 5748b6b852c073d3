"""`fibkv.Saver`: prefixes are written to a store by a worker, while their caches go on.

Pages are immutable and shared by reference, so what is to be written is what a cache holds at that moment, whatever
becomes of it; its raw newest tokens and states are copied.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from threading import BoundedSemaphore, Lock
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from transformers import StoppingCriteria

from fibkv.errors import ContractError, ModelError
from fibkv.hf_prefix import snapshot
from fibkv.prefix import TokenIds
from fibkv.prefix_save import Saved, Snapshot, write_each
from fibkv.store.base import Store, check_store

if TYPE_CHECKING:
    from fibkv.hf import Cache


class Saver:
    """Writes prefixes beside the model, one after another, on one thread. Safe to use from many threads.

    What was given to it is written before the process ends, unless it is killed: then the store holds a beginning of
    it, in whole objects. `close`, or the end of a ``with`` block, waits for it.

    Args:
        store: where to. A store that fails does not raise: the results say so, and `failures`.
        most_waiting: prefixes that are not written yet, at most: `save` waits while there are as many. Their pages
            stay in memory for so long.

    Attributes:
        failures: what could not be written, one line each.
        is_closed: it takes no more.
    """

    def __init__(self, store: Store, *, most_waiting: int = 4) -> None:
        if most_waiting < 1:
            raise ContractError("Saver.most_waiting", "at least 1", most_waiting)
        check_store("Saver.store", store)
        self.store = store
        self.failures: list[str] = []
        self._worker = ThreadPoolExecutor(1, "fibkv-saver")
        self._places = BoundedSemaphore(most_waiting)
        self._unfinished = 0
        self.is_closed = False
        self._lock = Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is waiting or being written."""
        return self._unfinished == 0

    def save(self, cache: Cache, token_ids: TokenIds | Tensor, *, name: str | None = None) -> Future[Saved]:
        """Saves what the cache holds now of one row, as `Cache.save` does, and does not wait for it.

        Returns:
            ``result()`` waits and gives what `Cache.save` returns, or raises what writing it raised.

        Raises:
            ModelError, ContractError: as `Cache.save` does; or the saver is closed.
        """
        return self.write(snapshot(cache, token_ids, name))

    def write(self, taken: Snapshot) -> Future[Saved]:
        """Writes what was taken of layers, which may go on; see `save`.

        Raises:
            ContractError: the saver is closed.
        """
        kept = taken.kept()
        self._places.acquire()  # until it is written, see `_note`
        with self._lock:
            try:
                future = self._worker.submit(self._write, kept)
            except RuntimeError as error:
                self._places.release()
                raise ContractError("Saver", "one that is open", "one that is closed") from error
            self._unfinished += 1
        future.add_done_callback(self._note)
        return future

    def close(self) -> None:
        """Waits until everything is written, and takes no more."""
        self.is_closed = True
        self._worker.shutdown()

    def _write(self, kept: Snapshot) -> Saved:
        # One object after another: a process that ends lets this thread finish, but starts no others.
        return write_each(self.store, kept, partial)

    def _note(self, future: Future[Saved]) -> None:
        with self._lock:
            self._unfinished -= 1
        self._places.release()
        if future.cancelled():
            return
        error = future.exception()
        failure = future.result().failure if error is None else str(error)
        if failure is not None:
            self.failures.append(failure)


class SavesPages(StoppingCriteria):
    """Saves full pages while an answer is generated, whenever a saver has nothing else to do. Stops nothing.

    Args:
        saver: that writes them.
        cache: that the answer is generated with, of one row.
        name: of the model's weights, see `Cache.save`.
    """

    def __init__(self, saver: Saver, cache: Cache, name: str | None) -> None:
        self._saver = saver
        self._cache = cache
        self._name = name
        self._tokens = 0
        self._spans = 0

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # noqa: ARG002 - transformers'
        """Called for every token: ``input_ids [1, t]`` are all that the cache holds, and the newest."""
        tokens = self._cache.get_seq_length()
        if self._saver.is_idle and tokens - self._tokens >= self._cache.settings.tokens_per_page:
            self._tokens = tokens
            # The answer goes on; what cannot be saved is told when it is saved as a whole.
            with suppress(ContractError, ModelError):
                self._save(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def _save(self, input_ids: Tensor) -> None:
        taken = snapshot(self._cache, input_ids, self._name)
        if taken.regular > self._spans:
            self._saver.write(taken.spans_from(self._spans))
            self._spans = taken.regular
