"""Attention of queries of one kind on the pages of a layer: decided once, then done at each step.

A `Plan` is made when pages change. It keeps a `Step` for each kind of queries that it has met: which kernels read which
pages, how these are split, which spaces there are. What a call fills in is what moves: the query, the tail and its
length, the mask, and where outputs go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby

import torch
from torch import Tensor

from fibkv.errors import KernelError
from fibkv.kernels import cuda_attend
from fibkv.kernels.cuda_attend import CudaPages
from fibkv.kernels.runs import Scores
from fibkv.kernels.triton_launch import stream_of
from fibkv.kernels.triton_load import INTERPRETED
from fibkv.kernels.triton_merge import Merge, Space
from fibkv.kernels.triton_moving import Held, Kind, Moving
from fibkv.kernels.triton_pages import Tail, TritonPages
from fibkv.kernels.triton_plan import Group
from fibkv.kernels.triton_queries import Queries
from fibkv.kernels.triton_sides import on_device
from fibkv.kernels.triton_tuning import Tunings

# Steps that a plan keeps: those of decoding are few, and who reads chunks of ever new lengths decides anew.
MOST_STEPS = 16


class Plan:
    """Pages as kernels read them, with the steps that were decided for them.

    Attributes:
        groups: of pages; those whose outputs are in one space side by side, those in none last, where the tail is.
    """

    def __init__(self, groups: Sequence[Group], tunings: Callable[[torch.device], Tunings]) -> None:
        self.groups = sorted(groups, key=lambda group: (group.out_rotation is None, id(group.out_rotation)))
        self._tunings = tunings
        self._steps: dict[Kind, Step] = {}

    def attend(
        self, query: Tensor, tail: tuple[Tensor, Tensor, int], scores: Scores, past: int
    ) -> tuple[Tensor, Tensor]:
        """Attention on the pages and a tail; see `fibkv.kernels.runs.InPlace.attend_plan`.

        Args:
            query: ``[B, Hq, Q, d]`` floating.
            tail: keys, values, and how many tokens of them are in use.
            scores: how logits become weights.
            past: tokens before the first query.

        Raises:
            KernelError: queries, tail and pages on several devices, or a tuning that the device has no room for.
        """
        keys, values = (Held(side.shape, side.dtype, side.device) if tail[2] else None for side in tail[:2])
        masks, bent = self._masks(scores, query.shape[2], past), scores.softcap is not None
        kind = Kind(query.device, query.dtype, query.shape, tail[0].shape[1], keys, values, masks, bent)
        step = self._steps.get(kind)
        if step is None:
            if len(self._steps) == MOST_STEPS:
                self._steps.clear()
            step = self._steps[kind] = Step.of(self.groups, kind, self._tunings(query.device))
        return step.attend(query, tail, scores, past)

    def _masks(self, scores: Scores, length: int, past: int) -> tuple[str, ...]:
        """See `Kind.masks`."""
        if scores.mask is not None:
            return ("bool" if scores.mask.dtype == torch.bool else "float",) * (len(self.groups) + 1)
        if length == 1 or not scores.causal:
            # One query is the newest token, from which nothing is hidden.
            return ("none",) * (len(self.groups) + 1)
        return *("causal" if group.stop > past + 1 else "none" for group in self.groups), "causal"


@dataclass(frozen=True, eq=False)
class Step:
    """How queries of one kind attend.

    Attributes:
        kind: of the queries.
        queries: the spaces that they are taken to.
        pages: that are read, with the places of their queries and the slots of their first splits.
        tail: how it is read; None = it is empty.
        merge: of the splits.
        slots: splits of the pages; those of the tail come behind them.
        whole: whether each split has all rows and heads.
        width: of a value.
    """

    kind: Kind
    queries: Queries
    pages: Sequence[tuple[TritonPages | CudaPages, int, int]]
    tail: Tail | None
    merge: Merge
    slots: int
    whole: bool
    width: int

    @classmethod
    def of(cls, groups: Sequence[Group], kind: Kind, tunings: Tunings) -> Step:
        """Decides.

        Args:
            groups: in the order of `Plan.groups`.
            kind: of the queries.
            tunings: of their device.

        Raises:
            KernelError: queries, tail and pages on several devices.
        """
        _check_devices(groups, kind)
        rows, heads, _ = kind.sizes
        room = _multiprocessors(kind.device)
        parts = [_part(group, mask, kind, tunings, room) for group, mask in zip(groups, kind.masks, strict=False)]
        *slots, stop = 0, *accumulate(part.splits for part in parts)
        queries = Queries(groups, kind)
        places = [queries.place(group) for group in groups]
        width = kind.values.shape[3] if kind.values is not None else groups[0].value_tables.head_dim
        spaces = _spaces(groups, [*slots, stop], kind.device)
        plain = spaces[-1].stop if spaces else 0
        shape = torch.Size((*kind.shape[:3], width))
        return cls(
            kind=kind,
            queries=queries,
            pages=list(zip(parts, places, slots, strict=True)),
            tail=None if kind.keys is None else Tail.of(kind, tunings, room),
            merge=Merge(spaces, plain if kind.keys or plain < stop else None, shape, kind.dtype, kind.device),
            slots=stop,
            whole=all(group.rows == (0, rows) and group.heads == (0, heads) for group in groups),
            width=width,
        )

    def attend(
        self, query: Tensor, tail: tuple[Tensor, Tensor, int], scores: Scores, past: int
    ) -> tuple[Tensor, Tensor]:
        """See `Plan.attend`."""
        device = query.device
        slots = self.slots + (0 if self.tail is None else self.tail.cut(tail[2])[0])
        outs = torch.empty(slots * self.queries.count * self.width, dtype=torch.float32, device=device)
        lses = torch.empty(slots * self.queries.count, dtype=torch.float32, device=device)
        if not self.whole:
            # What no part covers is not written.
            lses.fill_(-torch.inf)
        moving = Moving.of(scores, past, outs, lses, stream_of(device))
        turned = self.queries(query, moving.stream)
        for part, place, slot in self.pages:
            part.launch(turned[place], slot, moving)
        if self.tail is not None:
            self.tail.launch(turned[0], tail, past + self.kind.length, self.slots, moving)
        return self.merge(outs, lses, slots, moving.stream)


def _check_devices(groups: Sequence[Group], kind: Kind) -> None:
    for device in [group.device for group in groups] + [held.device for held in (kind.keys, kind.values) if held]:
        if device != kind.device:
            raise KernelError(f"query: expected {device} of the pages, got {kind.device}")


def _part(group: Group, mask: str, kind: Kind, tunings: Tunings, room: int) -> TritonPages | CudaPages:
    found = cuda_attend.reading(group, mask, kind.softcap, kind.sizes[2]) if tunings.cuda else None
    if found is None:
        return TritonPages.of(group, mask, kind, tunings, room)
    return CudaPages.of(group, found, kind, room)


def _spaces(groups: Sequence[Group], slots: Sequence[int], device: torch.device) -> list[Space]:
    """The splits that are behind a rotation; ``slots`` are where those of each group begin, and where the last end."""
    spaces: list[Space] = []
    first = 0
    for rotation, same in groupby(groups, key=lambda group: group.out_rotation):
        members = list(same)
        stop = first + len(members)
        if rotation is not None:
            matrix = on_device(members[0].value_tables, device).rotation
            assert matrix is not None
            spaces.append(Space(slots[first], slots[stop], matrix))
        first = stop
    return spaces


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    if INTERPRETED:
        # Enough for more than one split.
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
