"""One step of attention on Triton: queries taken to the codes' spaces, splits, their merge, outputs taken back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fibkv.errors import KernelError
from fibkv.kernels import cuda_attend
from fibkv.kernels.cuda_attend import Reading
from fibkv.kernels.runs import Scores
from fibkv.kernels.triton_attend import attend_splits
from fibkv.kernels.triton_load import INTERPRETED
from fibkv.kernels.triton_merge import merge, turn
from fibkv.kernels.triton_plan import Group
from fibkv.kernels.triton_sides import on_device, power_of_two
from fibkv.kernels.triton_tuning import Tuning, Tunings
from fibkv.rotation import Rotation
from fibkv.space import KeySpace
from fibkv.tables import Tables

# What a matrix unit takes at least, and rows of queries that a program takes at most: from 64 on Triton 3.6 takes other
# instructions of an H100, and fails to compile operands that are loaded as they are, those of trellis codes.
LEAST, MOST = 16, 32


@dataclass(frozen=True, eq=False)
class Step:
    """What all launches of a step share.

    Attributes:
        query: ``[B, H, G * Q, d]`` floating.
        length: Q.
        past: tokens before the first query.
        scores: how logits become weights.
        tunings: of the device.
    """

    query: Tensor
    length: int
    past: int
    scores: Scores
    tunings: Tunings

    def attend(self, groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
        """``out [B, H, G * Q, d_value]`` and ``lse [B, H, G * Q]``, float32.

        Raises:
            KernelError: codes on another device than the queries.
        """
        for group in groups:
            if group.device != self.query.device:
                raise KernelError(f"query: expected {group.device} of the pages, got {self.query.device}")
        # Parts in one space lie side by side, and are merged together.
        groups = sorted(groups, key=lambda group: id(group.out_rotation))
        parts = [_Part(group, self._reading(group)) for group in groups]
        cuts = [self._cut(part) for part in parts]
        slots = [0, *accumulate(count for count, _ in cuts)]
        *axes, _ = self.query.shape
        outs = torch.empty(slots[-1], *axes, groups[0].value_tables.head_dim, device=self.query.device)
        whole = all(group.rows == (0, axes[0]) and group.heads == (0, axes[1]) for group in groups)
        # What no part covers is not written.
        lses = outs.new_empty(slots[-1], *axes) if whole else outs.new_full((slots[-1], *axes), -torch.inf)
        queries = _Queries(self.query, groups)
        for part, cut, slot in zip(parts, cuts, slots[:-1], strict=True):
            self._launch(part, cut, slot, queries, outs, lses)
        return merge(outs, lses, _spaces(groups, slots))

    def _reading(self, group: Group) -> Reading | None:
        if not self.tunings.cuda:
            return None
        return cuda_attend.reading(group, self._kind(group), self.scores.softcap is not None, self.query.shape[2])

    def _cut(self, part: _Part) -> tuple[int, int]:
        """(splits, tiles of each) of a group."""
        group, multiprocessors = part.group, _multiprocessors(self.query.device)
        if part.reading is not None:
            return cuda_attend.splits(group, part.reading, self.query.shape[2], multiprocessors)
        tuning = self._tuning(group)
        tiles = group.spans * _ceil(group.tokens, _tile(group, tuning))
        programs: int = self._programs(group) * (group.rows[1] - group.rows[0])
        wanted = max(1, tuning.programs * multiprocessors // programs)
        each = _ceil(tiles, min(wanted, tiles))
        return _ceil(tiles, each), each

    def _programs(self, group: Group) -> int:
        """Programs of one row and split."""
        return (group.heads[1] - group.heads[0]) * _ceil(self.query.shape[2], self._block())

    def _tuning(self, group: Group) -> Tuning:
        key, _ = group.sides
        return self.tunings.of(key.kind)

    def _block(self) -> int:
        return min(MOST, max(LEAST, power_of_two(self.query.shape[2])))

    def _launch(
        self, part: _Part, cut: tuple[int, int], slot: int, queries: _Queries, outs: Tensor, lses: Tensor
    ) -> None:
        group, found = part.group, part.reading
        turned = queries.of(group)
        if found is None:
            self._launch_triton(group, cut, slot, turned, outs, lses)
            return
        masking, scales = self._mask(), (self.scores.scale, self.scores.softcap or 0.0)
        cuda_attend.attend(group, found, cut, slot, *turned, *masking, self.length, *scales, outs, lses)

    def _launch_triton(
        self,
        group: Group,
        cut: tuple[int, int],
        slot: int,
        turned: tuple[Tensor, Tensor | None],
        outs: Tensor,
        lses: Tensor,
    ) -> None:
        (count, tiles), (query, bias) = cut, turned
        mask, strides = self._mask()
        key, value = group.sides
        key_tables, value_tables = (on_device(t, query.device) for t in (group.key_tables, group.value_tables))
        rows, heads = query.shape[:2]
        nothing = lses
        tuning = self._tuning(group)
        try:
            attend_splits[(count, self._programs(group), group.rows[1] - group.rows[0])](
                query,
                nothing if bias is None else bias,
                nothing if group.addresses is None else group.addresses,
                nothing if group.aligned else group.held[0].view(torch.uint8),
                nothing if group.aligned else group.held[1].view(torch.uint8),
                key_tables.halves,
                nothing if key_tables.rotation is None else key_tables.rotation,
                value_tables.halves,
                nothing if value_tables.rotation is None else value_tables.rotation,
                nothing if mask is None else mask,
                outs,
                lses,
                group.rows[0],
                group.heads[0],
                group.heads[1] - group.heads[0],
                rows,
                heads,
                query.shape[2],
                self.length,
                group.start,
                group.spans,
                group.tokens,
                group.capacity,
                tiles,
                slot,
                self.past,
                *strides,
                self.scores.scale,
                self.scores.softcap or 0.0,
                KEY=key,
                VALUE=value,
                PAGED=group.aligned,
                BIASED=bias is not None,
                MASK=self._kind(group),
                SOFTCAP=self.scores.softcap is not None,
                QUERIES=self._block(),
                TOKENS=_tile(group, tuning),
                num_warps=tuning.warps,
                num_stages=tuning.stages,
                enable_fp_fusion=True,
            )
        except OutOfResources as error:
            raise KernelError(f"triton kernels: {error}, at {tuning}") from error

    def _kind(self, group: Group) -> str:
        if self.scores.mask is not None:
            return "bool" if self.scores.mask.dtype == torch.bool else "float"
        hidden = group.start + group.spans * group.tokens > self.past + 1
        return "causal" if self.scores.causal and hidden else "none"

    def _mask(self) -> tuple[Tensor | None, tuple[int, int, int]]:
        """The mask as kernels read it, with the strides of its rows, heads and queries."""
        mask = self.scores.mask
        if mask is None:
            return None, (0, 0, 0)
        mask = mask.detach()
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask.to(torch.float32)
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
        row, head, query = (0 if mask.shape[axis] == 1 else mask.stride(axis) for axis in range(3))
        return mask, (row, head, query)


@dataclass(frozen=True, eq=False)
class _Part:
    """A group, and the CUDA kernel that reads it, if one does."""

    group: Group
    reading: Reading | None


class _Queries:
    """Queries in the spaces of the groups, each made once."""

    def __init__(self, query: Tensor, groups: Sequence[Group]) -> None:
        self._turned: dict[tuple[KeySpace | None, Rotation | None], tuple[Tensor, Tensor | None]] = {}
        turned = [group for group in groups if group.space is None and group.query_rotation is not None]
        if not turned:
            self._query = query.to(torch.float32).contiguous()
            return
        # Widened by the launch that turns them.
        self._query, first = turn(query, _matrix(turned[0].key_tables, query.device))
        self._turned[None, turned[0].query_rotation] = first, None

    def of(self, group: Group) -> tuple[Tensor, Tensor | None]:
        """Queries ``[B, H, G * Q, d]`` for the group's keys, and what their mean adds, ``[B, H, G * Q]``, or None."""
        where = (group.space, group.query_rotation)
        if where not in self._turned:
            query, bias = self._query, None
            if group.space is not None:
                space = _space_on(group.space, query.device)
                bias = (query @ space.mean.unsqueeze(-1)).squeeze(-1).contiguous()
                query = space.queries(query).contiguous()
            if group.query_rotation is not None:
                _, query = turn(query, _matrix(group.key_tables, query.device))
            self._turned[where] = query, bias
        return self._turned[where]


def _matrix(tables: Tables, device: torch.device) -> Tensor:
    rotation = on_device(tables, device).rotation
    assert rotation is not None
    return rotation


def _spaces(groups: Sequence[Group], slots: Sequence[int]) -> list[tuple[int, int, Tensor | None]]:
    """Half-open ranges of slots whose outputs are in one space, and the matrix that takes them there."""
    spaces: list[tuple[int, int, Tensor | None]] = []
    first = 0
    for _, same in groupby(groups, key=lambda group: id(group.out_rotation)):
        members = list(same)
        group, stop = members[0], first + len(members)
        matrix = None if group.out_rotation is None else _matrix(group.value_tables, group.device)
        spaces.append((slots[first], slots[stop], matrix))
        first = stop
    return spaces


def _tile(group: Group, tuning: Tuning) -> int:
    """Tokens that a program multiplies at a time. Of the capacity, so that a growing tail makes no new kernel."""
    return min(tuning.tokens, max(LEAST, power_of_two(group.capacity)))


@lru_cache(maxsize=64)
def _space_on(space: KeySpace, device: torch.device) -> KeySpace:
    return space.to(device)


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    if INTERPRETED:
        # Enough for more than one split.
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def _ceil(number: int, by: int) -> int:
    return -(-number // by)
