"""Saving a prefix: what the caches of all layers hold of one row, span by span, into a store.

Spans are written in order, each whole or not at all, so that whatever interrupts a save leaves a shorter prefix. They
are shared by all prompts that begin alike: what the store has already is not written again.

What layers hold is taken first, which is quick (`Snapshot`), and written then: at once, the next span being made on a
second thread while one is written, or by a worker while the layers go on (`fibkv.hf_saver`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from fibkv.cache import LayerCache
from fibkv.contract import Contract, Total
from fibkv.errors import ContractError, PageError, StoreError
from fibkv.manifest import (
    Binding,
    EndHeader,
    LayerForm,
    Root,
    end_to_bytes,
    root_from_bytes,
    root_to_bytes,
    span_to_bytes,
)
from fibkv.page import Page
from fibkv.prefix import TokenIds, chain, chain_names
from fibkv.prefix_places import end_key, root_key, span_key
from fibkv.states import LayerState
from fibkv.store.base import Store

Begin = Callable[..., Callable[[], bytes | memoryview]]


class Saved(Contract):
    """What came of saving a prefix.

    Attributes:
        tokens: of the prefix.
        written: objects written.
        shared: objects that the store had already.
        nbytes: bytes written.
        failure: why the store holds only a beginning of it, or nothing; None = it holds all.
    """

    tokens: Total
    written: Total
    shared: Total
    nbytes: Total
    failure: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """What layers hold of a prefix at one moment. Pages never change; tails and states do, unless they are copies.

    Attributes:
        root: of the prefix: what it is bound to.
        ids: ``[t]``, of all tokens held.
        columns: the pages of all layers, by span.
        first: of the columns that are to be written.
        tails: per layer, raw keys and values behind the pages ``[1, H, t, d]``; None = spans alone are to be written.
        states: what layers hold beside pages; the prefix can then be taken up at its whole length only.
    """

    root: Root
    ids: TokenIds
    columns: tuple[tuple[Page, ...], ...]
    first: int
    tails: tuple[tuple[Tensor, Tensor], ...] | None
    states: tuple[LayerState, ...]

    @classmethod
    def take(
        cls, binding: Binding, layers: Sequence[LayerCache], token_ids: TokenIds, states: Sequence[LayerState] = ()
    ) -> Snapshot:
        """What layers hold now; tails and states are views, good until the layers change.

        Args:
            binding: what the prefix is bound to.
            layers: of one row, all of one length L.
            token_ids: ``[t]``, t >= L: the tokens that the layers hold, and maybe some behind them.
            states: what layers hold beside pages.

        Raises:
            ContractError: fewer ids than tokens, layers of different lengths, or other than one row.
        """
        length = _length(layers)
        if len(token_ids) < length:
            raise ContractError("save.token_ids", f"the ids of the {length} tokens held", f"{len(token_ids)} ids")
        _wait_for(layers)
        raw = (layer.tail for layer in layers)
        return cls(
            root=Root(binding=binding, layers=tuple(LayerForm.of(layer.settings) for layer in layers)),
            ids=token_ids[:length],
            columns=tuple(zip(*(layer.rows[0] for layer in layers), strict=True)),
            first=0,
            tails=tuple((tail.keys[:, :, : tail.length], tail.values[:, :, : tail.length]) for tail in raw),
            states=tuple(states),
        )

    def kept(self) -> Snapshot:
        """The snapshot with ids, tails and states of its own, for layers that go on."""
        return replace(
            self,
            ids=np.array(self.ids),
            tails=self.tails and tuple((keys.clone(), values.clone()) for keys, values in self.tails),
            states=tuple(
                replace(state, tensors={name: tensor.clone() for name, tensor in state.tensors.items()})
                for state in self.states
            ),
        )

    def spans_from(self, first: int) -> Snapshot:
        """Its full pages alone, from a span on before which all are known to be there."""
        return replace(self, first=first, tails=None, states=())

    @property
    def regular(self) -> int:
        """How many of the columns, from the first on, are spans: full pages."""
        size = self.root.binding.tokens_per_page
        found = (index for index, pages in enumerate(self.columns) if not _is_span(pages, index * size, size))
        return next(found, len(self.columns))


def save_prefix(
    store: Store,
    binding: Binding,
    layers: Sequence[LayerCache],
    token_ids: TokenIds,
    states: Sequence[LayerState] = (),
) -> Saved:
    """Saves what layers hold, under the names of their tokens: `Snapshot.take`, then `write_prefix`.

    Raises:
        ContractError, DigestMismatch: as these do.
    """
    return write_prefix(store, Snapshot.take(binding, layers, token_ids, states))


def write_prefix(store: Store, snapshot: Snapshot) -> Saved:
    """Writes what was taken, the next object being made while one is written.

    Args:
        store: where to. A store that fails does not raise here.
        snapshot: of layers that do not change meanwhile, or that it has kept what changes of.

    Raises:
        DigestMismatch: a page was damaged in memory.
    """
    with ThreadPoolExecutor(1, "fibkv-save") as making:
        return write_each(store, snapshot, lambda make, *contents: making.submit(make, *contents).result)


def write_each(store: Store, snapshot: Snapshot, begin: Begin) -> Saved:
    """Writes what was taken object by object; see `write_prefix`.

    Args:
        store: where to.
        snapshot: what to write.
        begin: of a function and its arguments: begins to call it, and gives what its answer is asked of.
    """
    writer = _Writer(store, begin)
    failure = None
    try:
        _write(writer, snapshot)
    except StoreError as error:
        failure = str(error)
    return Saved(
        tokens=len(snapshot.ids), written=writer.written, shared=writer.shared, nbytes=writer.nbytes, failure=failure
    )


def _write(writer: _Writer, snapshot: Snapshot) -> None:
    binding, columns, ids = snapshot.root.binding, snapshot.columns, snapshot.ids
    size, regular = binding.tokens_per_page, snapshot.regular
    names = [binding.name, *chain_names(binding.name, ids, [size * (i + 1) for i in range(regular)])]
    writer.put_root(snapshot.root)
    for index in range(snapshot.first, regular):
        previous, name = names[index : index + 2]
        writer.put(span_key(name), span_to_bytes, name, previous, columns[index])
    start = size * regular
    if snapshot.tails is not None and start < len(ids):
        rest = [page for pages in columns[regular:] for page in pages]
        header = EndHeader(
            name=chain(names[-1], ids[start:]),
            previous=names[-1],
            start=start,
            length=len(ids),
            boundaries=tuple(pages[0].start + pages[0].tokens for pages in columns[regular:]),
            pages=tuple(page.digest for page in rest),
            states=tuple(state.form() for state in snapshot.states),
        )
        writer.put(end_key(header), end_to_bytes, header, rest, snapshot.tails, snapshot.states)
    writer.finish()


def _length(layers: Sequence[LayerCache]) -> int:
    lengths = {layer.length for layer in layers}
    if len(lengths) != 1 or not max(lengths):
        raise ContractError("save", "layers that hold the same tokens, at least one", f"lengths {sorted(lengths)}")
    if any(layer.batch != 1 for layer in layers):
        raise ContractError("save", "one row; batch_select_indices takes one out of a fork", f"{layers[0].batch} rows")
    return max(lengths)


def _wait_for(layers: Sequence[LayerCache]) -> None:
    """Waits for what the caller's streams still do to the layers: another thread's stream would not."""
    for device in {layer.tail.keys.device for layer in layers}:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def _is_span(pages: Sequence[Page], start: int, tokens: int) -> bool:
    return all((page.start, page.tokens) == (start, tokens) for page in pages)


@dataclass(slots=True)
class _Writer:
    """Writes what the store does not have, and counts. At most one object is made and not yet written."""

    store: Store
    begin: Begin
    written: int = 0
    shared: int = 0
    nbytes: int = 0
    keys: list[str] = field(default_factory=list)
    _coming: tuple[str, Callable[[], bytes | memoryview]] | None = None

    def put_root(self, root: Root) -> None:
        """Writes the root, or checks that the one which is there speaks of the same profiles."""
        key = root_key(root.binding)
        there = self.store.get(key)
        if there is None:
            self.put(key, root_to_bytes, root)
            return
        try:
            same = root_from_bytes(there, root.binding) == root
        except (PageError, ContractError) as error:
            raise StoreError(f"{key} is damaged, restoring moves it aside: {error}") from error
        if not same:
            raise StoreError(f"{key}: the store holds prefixes of this model in pages of other profiles")
        self.keys.append(key)

    def put(self, key: str, make: Callable[..., bytes | memoryview], *contents: object) -> None:
        """Writes one object unless it is there: when the next one is being made, or when all are done."""
        self.keys.append(key)
        if self.store.exists(key):
            self.shared += 1
            return
        made = self.begin(make, *contents)
        self._write_made()
        self._coming = (key, made)

    def finish(self) -> None:
        """Writes the last one. The beginning, which everything behind it needs, counts as used last."""
        self._write_made()
        self.store.touch(self.keys[::-1])

    def _write_made(self) -> None:
        if self._coming is None:
            return
        (key, made), self._coming = self._coming, None
        data = made()
        self.store.put(key, data)
        self.written += 1
        self.nbytes += len(data)
