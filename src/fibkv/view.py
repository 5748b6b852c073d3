"""Snapshots of one layer's cache, and the parts in which attention reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from fibkv.codecs import Codec, codec_for
from fibkv.codes import Codes, RawCodes
from fibkv.errors import PageError
from fibkv.kernels.runs import InPlace, Run
from fibkv.kernels.tokens import write_tokens
from fibkv.packed import Held
from fibkv.page import Page, decode_segments
from fibkv.parameters import RawParameters
from fibkv.shape import Dtype
from fibkv.space import KeySpace

# Tokens that attention reads at a time: pages of equal form are stacked up to this many.
TILE_TOKENS = 1024
DTYPE_NAMES: dict[torch.dtype, Dtype] = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What attention reads at once: P consecutive spans of T tokens, for a range of heads.

    Attributes:
        rows: which batch rows; B of them.
        start: first token; span ``p`` starts at ``start + p * tokens``.
        tokens: T.
        heads: half-open range of KV heads.
        key_codec: codec of the keys.
        keys: ``[B, P, heads, T, ...]``.
        value_codec: codec of the values.
        values: ``[B, P, heads, T, ...]``.
        space: of the keys, for all KV heads; None = they are coded as they are.
    """

    rows: slice
    start: int
    tokens: int
    heads: tuple[int, int]
    key_codec: Codec
    keys: Codes
    value_codec: Codec
    values: Codes
    space: KeySpace | None = None

    @property
    def spans(self) -> int:
        """P."""
        return self._leading().shape[1]

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self._leading().device

    def _leading(self) -> Tensor:
        return next(self.keys.named())[1]


@dataclass(frozen=True, slots=True, eq=False)
class Tail:
    """The newest tokens, raw.

    Attributes:
        keys: ``[B, H, capacity, d]``.
        values: ``[B, H, capacity, d_value]``.
        length: tokens in use.
    """

    keys: Tensor
    values: Tensor
    length: int

    def fits(self, keys: Tensor, values: Tensor) -> bool:
        """Whether tensors have the batch size, heads, widths, dtypes and device of what the tail holds."""
        return all(
            (*new.shape[:2], new.shape[3], new.dtype, new.device)
            == (*held.shape[:2], held.shape[3], held.dtype, held.device)
            for held, new in self._pairs(keys, values)
        )

    def check(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Refuses tensors that cannot stand behind the tail's.

        Raises:
            PageError: another batch size, heads, widths or dtypes, or more keys than values or fewer.
        """
        for name, held, new in (("keys", self.keys, keys), ("values", self.values, values)):
            (rows, heads, _, dim), shape = held.shape, new.shape
            expected = (rows, heads, dim, held.dtype)
            if len(shape) != 4 or (shape[0], shape[1], shape[3], new.dtype) != expected:
                raise PageError(
                    f"layer {layer} {name}: expected [batch, heads, head_dim, dtype] {list(expected)}, "
                    f"got {[*shape[:2], shape[-1], new.dtype]}"
                )
        if keys.shape[2] != values.shape[2]:
            raise PageError(f"layer {layer}: {keys.shape[2]} keys but {values.shape[2]} values")

    def extended(self, keys: Tensor, values: Tensor) -> Tail:
        """A tail with more tokens: written behind the used ones while there is room, else a new, exact-size one.

        A snapshot taken before sees its own length only, and that is never written again: room behind it
        is handed out once, since a shortened tail is always a copy (`kept`).
        """
        stop = self.length + keys.shape[2]
        if stop > self.keys.shape[2]:
            joined = [torch.cat([old[:, :, : self.length], new], 2) for old, new in self._pairs(keys, values)]
            return Tail(joined[0], joined[1], stop)
        for old, new in self._pairs(keys, values):
            write_tokens(old, self.length, new)
        return Tail(self.keys, self.values, stop)

    def kept(self, start: int, stop: int, capacity: int) -> Tail:
        """A copy of tokens ``start:stop`` with room for ``capacity``."""
        keys, values = (old.new_empty((*old.shape[:2], capacity, old.shape[3])) for old in (self.keys, self.values))
        return Tail(keys, values, 0).extended(self.keys[:, :, start:stop], self.values[:, :, start:stop])

    def map(self, function: Callable[[Tensor], Tensor]) -> Tail:
        """The tail with both tensors changed alike."""
        return replace(self, keys=function(self.keys), values=function(self.values))

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, unused room included."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values))

    def _pairs(self, keys: Tensor, values: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return (self.keys, keys), (self.values, values)


@contextmanager
def plain_tensors(like: Tensor) -> Iterator[None]:
    """What a cache keeps outlives the mode it was made in: no inference tensors, no gradients, no autocast."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        yield


class PageRows(tuple[tuple[Page, ...], ...]):
    """Page tables, one per batch row, with what kernels that read pages in place derive from them once."""

    def __deepcopy__(self, memo: dict[int, object]) -> PageRows:
        return self  # immutable

    def __reduce__(self) -> tuple[Any, ...]:
        return PageRows, (tuple(self),)

    def plan(self, kernels: InPlace) -> Any:
        """The plan by which kernels read these pages."""
        plans: dict[InPlace, Any] = self.__dict__.setdefault("plans", {})
        if kernels not in plans:
            plans[kernels] = kernels.plan(list(_runs(self)))
        return plans[kernels]


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """An immutable snapshot of one layer: what a handle reads, however the layer goes on.

    Attributes:
        rows: page tables, one per batch row; all rows have pages at the same tokens.
        tail: the newest tokens.
        length: tokens in all.
        implementation: of the kernels that read it.
        lease: what keeps the pages where they are.
    """

    rows: PageRows
    tail: Tail
    length: int
    implementation: str = "auto"
    lease: object = None

    @classmethod
    def of_tensors(cls, keys: Tensor, values: Tensor) -> View:
        """A view of plain tensors ``[B, H, length, d]``: a layer that is all tail."""
        length = keys.shape[2]
        return cls(PageRows([()] * keys.shape[0]), Tail(keys, values, length), length)

    def parts(self) -> Iterator[Part]:
        """The layer in tiles of at most `TILE_TOKENS` tokens, stacked one at a time."""
        yield from _page_parts(self.rows)
        yield from self._tail_parts()

    def decode(self, dtype: torch.dtype, *, implementation: str = "auto") -> tuple[Tensor, Tensor]:
        """Dense keys ``[B, H, length, d]`` and values ``[B, H, length, d_value]``."""
        keys, values = (
            old.new_empty((*old.shape[:2], self.length, old.shape[3]), dtype=dtype)
            for old in (self.tail.keys, self.tail.values)
        )
        for row, pages in enumerate(self.rows):
            for page in pages:
                span = slice(page.start, page.start + page.tokens)
                decode_segments(page.keys, keys[row, :, span], implementation=implementation)
                decode_segments(page.values, values[row, :, span], implementation=implementation)
        start = self.length - self.tail.length
        keys[:, :, start:] = self.tail.keys[:, :, : self.tail.length]
        values[:, :, start:] = self.tail.values[:, :, : self.tail.length]
        return keys, values

    def _tail_parts(self) -> Iterator[Part]:
        key_codec, value_codec = (
            codec_for(RawParameters(head_dim=old.shape[3], dtype=DTYPE_NAMES[old.dtype]))
            for old in (self.tail.keys, self.tail.values)
        )
        first = self.length - self.tail.length
        for start in range(0, self.tail.length, TILE_TOKENS):
            stop = min(start + TILE_TOKENS, self.tail.length)
            keys, values = (old[:, None, :, start:stop] for old in (self.tail.keys, self.tail.values))
            yield Part(
                rows=slice(None),
                start=first + start,
                tokens=stop - start,
                heads=(0, keys.shape[2]),
                key_codec=key_codec,
                keys=RawCodes(keys),
                value_codec=value_codec,
                values=RawCodes(values),
            )


def _columns(rows: PageRows) -> Iterator[tuple[slice, slice]]:
    """(rows, pages) that attention can read together: consecutive pages of equal form.

    Rows of another form (a raw fallback) are read on their own.
    """
    columns = list(zip(*rows, strict=True))
    for alike, group in groupby(range(len(columns)), key=lambda index: [page.run_key for page in columns[index]]):
        indices = list(group)
        is_one = all(key == alike[0] for key in alike)
        together = [slice(0, len(rows))] if is_one else [slice(row, row + 1) for row in range(len(rows))]
        for chosen in together:
            yield chosen, slice(indices[0], indices[-1] + 1)


def _page_parts(rows: PageRows) -> Iterator[Part]:
    """Pages in tiles of at most `TILE_TOKENS` tokens."""
    for chosen, pages in _columns(rows):
        step = max(1, TILE_TOKENS // rows[chosen.start][pages.start].tokens)
        for first in range(pages.start, pages.stop, step):
            span = slice(first, min(first + step, pages.stop))
            yield from _stacked(chosen, [row[span] for row in rows[chosen]])


def _runs(rows: PageRows) -> Iterator[Run]:
    """Pages where they lie, one run per segment of pages of equal form."""
    for chosen, pages in _columns(rows):
        first = rows[chosen.start][pages.start]
        count = len(first.form.keys)
        for index, (key, value) in enumerate(zip(first.form.keys, first.form.values, strict=True)):
            yield Run(
                rows=(chosen.start, chosen.stop),
                heads=key.heads,
                start=first.start + key.tokens[0],
                tokens=key.length,
                key_tables=key.codec.tables,
                keys=[[page.held[index] for page in row[pages]] for row in rows[chosen]],
                value_tables=value.codec.tables,
                values=[[page.held[count + index] for page in row[pages]] for row in rows[chosen]],
                space=key.space,
            )


def _stacked(chosen: slice, rows: list[tuple[Page, ...]]) -> Iterator[Part]:
    """One part per segment of pages of equal form."""
    first = rows[0][0]
    count = len(first.form.keys)
    for index, (key, value) in enumerate(zip(first.form.keys, first.form.values, strict=True)):
        yield Part(
            rows=chosen,
            start=first.start + key.tokens[0],
            tokens=key.length,
            heads=key.heads,
            key_codec=key.codec,
            keys=_stack([[page.held[index] for page in row] for row in rows]),
            value_codec=value.codec,
            values=_stack([[page.held[count + index] for page in row] for row in rows]),
            space=key.space,
        )


def _stack(held: list[list[Held]]) -> Codes:
    rows = [[codes.canonical() for codes in row] for row in held]
    stacked = [type(row[0]).stack(row) for row in rows]
    return type(stacked[0]).stack(stacked)
