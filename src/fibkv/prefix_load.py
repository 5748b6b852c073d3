"""Loading the longest stored beginning of a prompt.

What a store cannot give, or gives damaged, makes the beginning shorter and is reported. It never raises: without a
store there is only more to compute.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from torch import Tensor

from fibkv.contract import Contract, Total
from fibkv.errors import FibkvError, StoreError
from fibkv.manifest import Binding, End, Root, end_from_bytes, root_from_bytes, span_from_bytes
from fibkv.page import Page
from fibkv.prefix import TokenIds, chain, chain_names
from fibkv.prefix_places import end_place, ends_folder, root_key, span_key
from fibkv.sealing import LayerSettings
from fibkv.store.base import Store, set_aside
from fibkv.wire import PageReader

Loaded = TypeVar("Loaded")

# Spans that are read at the same time: what is far away comes as fast as the network can, not as it answers.
AHEAD = 4


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
    """

    length: int
    pages: tuple[tuple[Page, ...], ...]
    tails: tuple[tuple[Tensor, Tensor], ...] | None


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

    def load(self, settings: Sequence[LayerSettings]) -> Prefix:
        """The longest beginning that is stored whole.

        Args:
            settings: of the layers that the root speaks of.
        """
        size = self.binding.tokens_per_page
        readers = [PageReader(layer) for layer in settings]
        names = chain_names(self.binding.name, self.token_ids, range(size, len(self.token_ids) + 1, size))
        spans: list[tuple[Page, ...]] = []
        previous, found = self.binding.name, self._num_stored(names)
        with ThreadPoolExecutor(AHEAD) as reading:
            coming = deque(reading.submit(self.store.get, span_key(name)) for name in names[: min(found, AHEAD)])
            for name in names[:found]:
                place = (name, previous, size * len(spans), size)
                pages = self._checked(span_key(name), coming.popleft().result, span_from_bytes, place, readers)
                if pages is None:
                    break
                if (ahead := len(spans) + AHEAD) < found:
                    coming.append(reading.submit(self.store.get, span_key(names[ahead])))
                spans.append(pages)
                previous = name
        end = self._end(previous, size * len(spans), readers)
        columns = [tuple(span[layer] for span in spans) for layer in range(len(settings))]
        # The beginning, which everything behind it needs, counts as used last.
        self._try(self.store.touch, [*map(span_key, names[: len(spans)][::-1]), root_key(self.binding)])
        if end is None:
            return Prefix(size * len(spans), tuple(columns), None)
        whole = tuple((*before, *behind) for before, (behind, _, _) in zip(columns, end.layers, strict=True))
        return Prefix(end.length, whole, tuple((keys, values) for _, keys, values in end.layers))

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

    def _end(self, previous: str, start: int, readers: Sequence[PageReader]) -> End | None:
        """The longest end behind a span that the prompt goes on with."""
        listed = self._try(lambda: list(self.store.list(ends_folder(previous)))) or []
        places = {end_place(entry): entry.key for entry in listed}
        for length, name in sorted(places, reverse=True):
            if start < length <= len(self.token_ids) and chain(previous, self.token_ids[start:length]) == name:
                place = (name, previous, start, length)
                end = self._fetch(places[length, name], end_from_bytes, place, readers)
                if end is not None:
                    self._try(self.store.touch, [places[length, name]])
                    return end
        return None

    def _fetch(self, key: str, parse: Callable[..., Loaded], *context: object) -> Loaded | None:
        """One object, checked; see `_checked`."""
        return self._checked(key, partial(self.store.get, key), parse, *context)

    def _checked(
        self, key: str, get: Callable[[], bytes | None], parse: Callable[..., Loaded], *context: object
    ) -> Loaded | None:
        """What is got of an object, checked; None if it is not there. What does not stand the check is moved aside."""
        data = self._try(get)
        if data is None:
            return None
        try:
            found = parse(data, *context)
        except FibkvError as error:
            self.failures.append(f"{key}: {error}")
            self._try(set_aside, self.store, key)
            return None
        self.nbytes += len(data)
        return found

    def _try(self, call: Callable[..., Loaded], *args: object) -> Loaded | None:
        """What the store answers; None and a failure noted if it fails."""
        try:
            return call(*args)
        except StoreError as error:
            self.failures.append(str(error))
            return None
