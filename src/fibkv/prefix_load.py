"""Loading the longest stored beginning of a prompt.

What a store cannot give, or gives damaged, makes the beginning shorter and is reported. It never raises: without a
store there is only more to compute.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from torch import Tensor

from fibkv.contract import Contract, Total
from fibkv.errors import FibkvError, StoreError
from fibkv.manifest import Binding, End, Root, end_from_bytes, root_from_bytes
from fibkv.page import Page
from fibkv.prefix import TokenIds, chain, chain_names
from fibkv.prefix_places import end_place, ends_folder, root_key, span_key
from fibkv.prefix_spans import Span, SpanReader
from fibkv.sealing import LayerSettings
from fibkv.slabs import Slabs
from fibkv.states import LayerState
from fibkv.store.base import Store, set_aside
from fibkv.wire import PageReader

Loaded = TypeVar("Loaded")

# Spans behind which the end of a prefix with states is looked for, from the last that is stored on.
MAX_BACK = 64


class Restored(Contract):
    """What came of looking for a prompt's beginning in a store.

    Attributes:
        tokens: loaded; 0 = a miss.
        prompt_tokens: of the prompt.
        nbytes: bytes read.
        failures: what was damaged, could not be read or could not be used, one line each. Damaged objects have been
            moved aside in the store.
    """

    tokens: Total
    prompt_tokens: Total
    nbytes: Total
    failures: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """A loaded prefix.

    Attributes:
        length: tokens.
        pages: by layer, from token 0 on.
        tails: by layer, raw keys and values behind them ``[1, H, t, d]``; None = there are none.
        states: what layers hold beside pages at this length.
    """

    length: int
    pages: tuple[tuple[Page, ...], ...]
    tails: tuple[tuple[Tensor, Tensor], ...] | None
    states: tuple[LayerState, ...] = ()


class PrefixLoader:
    """Looks for the beginning of one prompt.

    Args:
        store: where.
        binding: what the prefix must be bound to.
        token_ids: ``[t]``.
    """

    def __init__(self, store: Store, binding: Binding, token_ids: TokenIds) -> None:
        self.store = store
        self.binding = binding
        self.token_ids = token_ids
        self.failures: list[str] = []
        self.nbytes = 0

    def root(self) -> Root | None:
        """The root of the binding: which layers there are. None = nothing is stored for it."""
        return self._fetch(root_key(self.binding), root_from_bytes, self.binding)

    def load(
        self, settings: Sequence[LayerSettings], *, with_states: bool = False, slabs: Slabs | None = None
    ) -> Prefix:
        """The longest beginning that is stored whole.

        Args:
            settings: of the layers that the root speaks of.
            with_states: only beginnings that end as one was saved, states included, and before the last token.
            slabs: memory that spans are put into as they come, in the order in which native kernels read them; None =
                codes stay where they were read until a layer adopts them, which other kernels do in any case.
        """
        size = self.binding.tokens_per_page
        names = chain_names(self.binding.name, self.token_ids, range(size, len(self.token_ids) + 1, size))
        count = self._num_stored(names)
        starts = [self.binding.name, *names]
        longest = len(self.token_ids) - with_states
        if with_states:
            back = range(count, max(-1, count - MAX_BACK), -1)
            count = next((number for number in back if self._ends(starts[number], number * size, longest)), 0)
        places = [(name, starts[index], index * size, size) for index, name in enumerate(names[:count])]
        spans = self._spans(SpanReader(self.store, settings, places, slabs), names)
        end = self._end(starts[len(spans)], size * len(spans), longest, list(map(PageReader, settings)))
        # The beginning, which everything behind it needs, counts as used last.
        self._try(self.store.touch, [*map(span_key, names[: len(spans)][::-1]), root_key(self.binding)])
        columns = [tuple(span[layer] for span in spans) for layer in range(len(settings))]
        if end is None:
            return (
                Prefix(0, ((),) * len(settings), None)
                if with_states
                else Prefix(size * len(spans), tuple(columns), None)
            )
        whole = tuple((*before, *behind) for before, (behind, _, _) in zip(columns, end.layers, strict=True))
        return Prefix(end.length, whole, tuple((keys, values) for _, keys, values in end.layers), end.states)

    def _spans(self, reader: SpanReader, names: Sequence[str]) -> list[tuple[Page, ...]]:
        """The pages of spans, as many from the first on as are sound."""
        spans: list[tuple[Page, ...]] = []
        with _collector_resting(), closing(reader.read()) as outcomes:
            for name, outcome in zip(names, outcomes, strict=False):
                pages = self._checked(span_key(name), partial(_found, outcome))
                if pages is None:
                    break
                spans.append(pages)
        return spans

    def _num_stored(self, names: Sequence[str]) -> int:
        """How many of the spans there are, if none is missing between two: found by halving."""
        low, high = 0, len(names)
        while low < high:
            middle = (low + high + 1) // 2
            if self._try(self.store.exists, span_key(names[middle - 1])):
                low = middle
            else:
                high = middle - 1
        return low

    def _ends(self, previous: str, start: int, longest: int) -> list[tuple[int, str, str]]:
        """Length, name and key of the ends behind a span that the prompt goes on with, the longest first."""
        listed = self._try(lambda: list(self.store.list(ends_folder(previous)))) or []
        found = ((end_place(entry), entry.key) for entry in listed)
        places = sorted(((*place, key) for place, key in found if place is not None), reverse=True)
        within = (place for place in places if start < place[0] <= longest)
        return [place for place in within if chain(previous, self.token_ids[start : place[0]]) == place[1]]

    def _end(self, previous: str, start: int, longest: int, readers: Sequence[PageReader]) -> End | None:
        """The longest sound end behind a span that the prompt goes on with."""
        for length, name, key in self._ends(previous, start, longest):
            end = self._fetch(key, end_from_bytes, (name, previous, start, length), readers)
            if end is not None:
                self._try(self.store.touch, [key])
                return end
        return None

    def _fetch(self, key: str, parse: Callable[..., Loaded], *context: object) -> Loaded | None:
        """One object, checked; see `_checked`."""

        def load() -> tuple[Loaded, int] | None:
            data = self.store.get(key)
            return None if data is None else (parse(data, *context), len(data))

        return self._checked(key, load)

    def _checked(self, key: str, load: Callable[[], tuple[Loaded, int] | None]) -> Loaded | None:
        """What an object holds; None if it is not there. What does not stand the check is moved aside.

        Args:
            key: of the object.
            load: gets and checks it; also its bytes.
        """
        try:
            found = self._try(load)
        except FibkvError as error:
            self.failures.append(f"{key}: {error}")
            self._try(set_aside, self.store, key)
            return None
        if found is None:
            return None
        self.nbytes += found[1]
        return found[0]

    def _try(self, call: Callable[..., Loaded], *args: object) -> Loaded | None:
        """What the store answers; None and a failure noted if it fails."""
        try:
            return call(*args)
        except StoreError as error:
            self.failures.append(str(error))
            return None


def _found(outcome: Span | FibkvError | None) -> Span | None:
    if isinstance(outcome, FibkvError):
        raise outcome
    return outcome


@contextmanager
def _collector_resting() -> Iterator[None]:
    """Without Python's garbage collector, which would look at all objects of the process again and again.

    A prefix of 32k tokens in 32 layers makes 300,000 objects, and none of them is garbage: a third of the time. It is
    a setting of the whole process: of two that load at once, the first to end turns the collector on again.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
