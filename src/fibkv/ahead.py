"""Sealing beside the model: pages are encoded and copied on a stream of their own, and taken over when they are there.

Nothing is waited for when sealing begins. The bytes of all pages of a layer go to the host in one copy per kind of
page; digests, and whether everything could be encoded, are looked at there, once the stream is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fibkv.blocks import Form, Layout, layout_of
from fibkv.coder import Column, RoleCoder
from fibkv.hard_statistics import key_flags, key_statistics
from fibkv.kernels.refusals import checked_later
from fibkv.page import Page
from fibkv.policy import Run
from fibkv.sealing import LayerSettings, Span, alike, pages_of
from fibkv.streams import Mark, Stream
from fibkv.view import Tail


class Room(Protocol):
    """Where new pages go."""

    def on_device(self, pages: int, nbytes: int) -> list[Tensor]:
        """A block ``[nbytes]`` uint8 for each page on the device, or none: pages then stay on the host."""

    def on_host(self, pages: int, nbytes: int) -> Tensor:
        """``[pages, nbytes]`` uint8, contiguous and pinned: what the pages' bytes are copied to."""


@dataclass(frozen=True, eq=False)
class _Batch:
    """Pages that are alike, of all rows: those of row 0 first, each at one of the spans."""

    spans: list[Span]
    layout: Layout
    keys: list[Column]
    values: list[Column]
    blocks: list[Tensor]
    host: Tensor

    def write(self, stream: Stream) -> None:
        """Puts the codes where they belong; to be called beside the model."""
        pages = torch.empty(self.host.shape, dtype=torch.uint8, device=self.keys[0].codes.device)
        self.layout.write([column.codes for column in (*self.keys, *self.values)], pages)
        stream.copy(self.host, pages)
        if self.blocks:
            torch._foreach_copy_(self.blocks, list(pages.unbind(0)))

    def pages(self, settings: LayerSettings, start: int) -> list[Page]:
        """The pages, once their bytes are on the host."""
        profiles = (settings.keys.profile_digest, settings.values.profile_digest)
        columns = [*self.keys, *self.values]
        like = [column.of(0) for column in columns]
        octets = self.host.numpy()
        made = []
        for index, block in enumerate(self.blocks or self.host.unbind(0)):
            codes = self.layout.read(block, like)
            segments = [column.segment(one) for column, one in zip(columns, codes, strict=True)]
            sides = tuple(segments[: len(self.keys)]), tuple(segments[len(self.keys) :])
            first, stop = self.spans[index % len(self.spans)]
            payload = self.layout.parts(octets[index].data)
            made.append(Page.seal(settings.layer, (start + first, start + stop), *sides, profiles, payload))
        return made


class Pending:
    """Pages of one layer that are under way.

    Attributes:
        tail: whose tokens they are of.
        stop: the token of the tail behind the last one of them.
        nbytes: on the device, beside those of the tail.
        may_wait: the next append takes them over.
    """

    may_wait = False

    def __init__(
        self, settings: LayerSettings, tail: Tail, start: int, batches: Sequence[_Batch], notes: Tensor, mark: Mark
    ) -> None:
        self.tail = tail
        self.stop = batches[-1].spans[-1][1]
        self.nbytes = sum(block.numel() for batch in batches for block in batch.blocks)
        self._settings = settings
        self._start = start
        self._batches = batches
        self._notes = notes
        self._mark = mark

    def pages(self) -> list[list[Page]] | None:
        """The new pages of each row in order, waited for on the host; None = one of them could not be encoded."""
        self._mark.synchronize()
        if self._notes[-1]:
            return None
        rows: list[list[Page]] = [[] for _ in range(self.tail.keys.shape[0])]
        for batch in self._batches:
            for index, page in enumerate(batch.pages(self._settings, self._start)):
                rows[index // len(batch.spans)].append(page)
        return rows

    def flags(self) -> tuple[str, ...] | None:
        """What is hard about the keys, if that was asked for; to be called behind `pages`."""
        statistics = self._notes[:-1]
        return key_flags(statistics.view(torch.float32).view(2, -1)) if len(statistics) else None


def begin(
    settings: LayerSettings, tail: Tail, length: int, spans: Sequence[Span], stream: Stream, room: Room, measured: bool
) -> Pending:
    """Begins to seal spans of a tail, of which nothing may be written before the pages are there.

    Args:
        settings: of the layer, without a sampler.
        tail: raw tokens ``[B, H, tokens, d]`` on a device, the newest ones of the layer.
        length: tokens of the layer, the tail's included.
        spans: page spans relative to the tail, at least one.
        stream: to work on.
        room: for the pages.
        measured: whether the keys of the first pages are looked at, for `Pending.flags`.

    Raises:
        DecisionError: the policy can neither compress nor keep raw.
    """
    start, rows = length - tail.length, tail.keys.shape[0]
    stream.uses(tail.keys, tail.values)
    planned = []
    for same, key_runs, value_runs in alike(settings, length, spans, start):
        layout = layout_of((*_forms(settings.keys, key_runs), *_forms(settings.values, value_runs)))
        # On the model's stream, to which pages belong, and where their memory is used again.
        blocks = room.on_device(rows * len(same), layout.nbytes)
        stream.uses(*blocks)
        planned.append((same, key_runs, value_runs, layout, blocks))
    with stream.beside(), checked_later() as checks:
        batches = []
        for same, key_runs, value_runs, layout, blocks in planned:
            keys, values = (
                [coder.encode(vectors, run) for run in runs]
                for coder, vectors, runs in (
                    (settings.keys, pages_of(tail.keys, same), key_runs),
                    (settings.values, pages_of(tail.values, same), value_runs),
                )
            )
            host = room.on_host(rows * len(same), layout.nbytes)
            batches.append(_Batch(same, layout, keys, values, blocks, host))
            batches[-1].write(stream)
        noted = [checks.any().reshape(1).view(torch.uint8)]
        if measured:
            protected = settings.keys.policy.protected.first_tokens_raw
            noted.insert(0, key_statistics(tail.keys[0, :, protected : spans[0][1]]).view(-1).view(torch.uint8))
        notes = stream.pinned(sum(map(len, noted)))
        stream.copy(notes, torch.cat(noted))
        mark = stream.mark()
    return Pending(settings, tail, start, batches, notes, mark)


def _forms(coder: RoleCoder, runs: Sequence[Run]) -> list[Form]:
    """The tensors of one side of a page, in canonical order."""
    return [
        (field.dtype, (run.heads[1] - run.heads[0], *field.shape))
        for run in runs
        for field in coder.codec_of(run.decision, run.heads).layout(run.tokens[1] - run.tokens[0])
    ]
