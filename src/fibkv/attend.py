"""Attention on a snapshot of the cache: part by part on the codes, one merge, one un-rotation.

The query is rotated once per space of the keys, outputs are summed per space of the values and un-rotated once at the
end. No tensor made here grows with the context: parts are stacked tile by tile, queries are taken in blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fibkv import kernels
from fibkv.errors import KernelError
from fibkv.kernels.runs import Scores
from fibkv.rotation import Rotation
from fibkv.space import KeySpace
from fibkv.tables import Tables
from fibkv.view import TILE_TOKENS, Part, View

__all__ = ["Scores", "attend"]

# Logits held at a time, over all rows and query heads.
LOGITS_LIMIT = 1 << 24


def attend(query: Tensor, view: View, scores: Scores, *, implementation: str | None = None) -> tuple[Tensor, Tensor]:
    """Attention of queries on everything that a view holds.

    Args:
        query: ``[B, Hq, Q, d]``, any floating dtype; ``Hq`` is a multiple of the view's KV heads.
        view: snapshot of one layer.
        scores: scale, mask, softcap.
        implementation: of the kernels; None = the view's.

    Returns:
        ``out [B, Hq, Q, d_value]`` in the query's dtype, and ``lse [B, Hq, Q]`` float32. Queries that may attend to
        nothing get zeros.

    Raises:
        KernelError: query or mask do not fit the view, or the softcap is not positive.
    """
    _check(query, view, scores)
    implementation = view.implementation if implementation is None else implementation
    chosen = kernels.in_place(implementation, query.device)
    if chosen is not None:
        tail = (view.tail.keys, view.tail.values, view.tail.length)
        out, lse = chosen.attend_plan(query, view.rows.plan(chosen), tail, scores, length=view.length)
        return out if out.dtype == query.dtype else out.to(query.dtype), lse
    batch, query_heads, length, _ = query.shape
    step = max(1, LOGITS_LIMIT // (batch * query_heads * min(TILE_TOKENS, view.length)))
    # Codes are read in the dtypes they are kept in, and float32 means float32, also inside an autocast region.
    with torch.autocast(query.device.type, enabled=False):
        blocks = [
            _attend_block(query[:, :, first : first + step], first, length, view, scores, implementation)
            for first in range(0, length, step)
        ]
    outs, lses = zip(*blocks, strict=True)
    return torch.cat(outs, 2).to(query.dtype), torch.cat(lses, 2)


def _check(query: Tensor, view: View, scores: Scores) -> None:
    shape, (rows, heads, _, dim) = query.shape, view.tail.keys.shape
    if len(shape) != 4 or shape[0] != rows or shape[1] % heads or shape[3] != dim:
        raise KernelError(
            f"query: expected head_dim {dim}, {rows} rows and a multiple of {heads} heads, got shape {list(shape)}"
        )
    if scores.softcap is not None and not scores.softcap > 0:
        raise KernelError(f"softcap: expected a positive number or None, got {scores.softcap!r}")
    if scores.mask is not None:
        _check_mask(scores.mask, query, view.length)


def _check_mask(mask: Tensor, query: Tensor, length: int) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise KernelError(f"attention mask: expected bool (True = attend) or floating (added), got {mask.dtype}")
    batch, heads, queries = query.shape[:3]
    wanted = (batch, heads, queries, length)
    fits = mask.ndim == 4 and all(size in (1, want) for size, want in zip(mask.shape[:2], wanted[:2], strict=True))
    if not fits or tuple(mask.shape[2:]) != wanted[2:]:
        raise KernelError(
            f"attention mask: expected shape {list(wanted)} or 1 in its first two, got {list(mask.shape)}"
        )


def _attend_block(
    query: Tensor, first: int, total: int, view: View, scores: Scores, implementation: str
) -> tuple[Tensor, Tensor]:
    """Attention of queries ``first:first + Q`` of ``total``; ``query [B, Hq, Q, d]``."""
    batch, query_heads, length, _ = query.shape
    heads = view.tail.keys.shape[1]
    groups = query_heads // heads
    # Query heads of one KV head become further queries: [B, H, G * Q, d].
    grouped = query.reshape(batch, heads, groups * length, -1).to(torch.float32)
    queries = _Queries(grouped)
    sums: dict[Rotation | None, _Sum] = {}
    block = _Block(first, length, groups, view.length - total)
    for part in view.parts():
        key_tables, value_tables = part.key_codec.tables, part.value_codec.tables
        visible, mask = block.mask(part, scores)
        if not visible:
            continue
        group = slice(*part.heads)
        turned, mean = queries.of(part.space, key_tables)
        out, lse = kernels.attend(
            turned[part.rows, None, group],
            part.keys,
            key_tables,
            part.values,
            value_tables,
            scale=scores.scale,
            mask=mask,
            softcap=scores.softcap,
            key_mean=None if mean is None else mean[group],
            implementation=implementation,
        )
        if value_tables.rotation not in sums:
            sums[value_tables.rotation] = _Sum(grouped, out.shape[-1], value_tables)
        sums[value_tables.rotation].add(part, out, lse)
    out, lse = _total(list(sums.values()))
    return out.view(batch, query_heads, length, -1), lse.view(batch, query_heads, length)


@dataclass(frozen=True, slots=True)
class _Block:
    """Where a block of queries stands: queries ``first:first + length`` of those that follow token ``past``."""

    first: int
    length: int
    groups: int
    past: int

    def mask(self, part: Part, scores: Scores) -> tuple[bool, Tensor | None]:
        """Whether any query sees the part, and the mask ``[B or 1, P, heads or 1, G * Q, T]`` for `kernels.attend`."""
        stop = part.start + part.spans * part.tokens
        if scores.mask is not None:
            return True, self._given(part, scores.mask, stop)
        newest = self.past + self.first
        if not scores.causal or stop <= newest + 1:
            return True, None
        if part.start > newest + self.length - 1:
            return False, None
        device = part.device
        queries = newest + torch.arange(self.length, device=device)
        keys = torch.arange(part.start, stop, device=device)
        seen = (keys <= queries[:, None])[None, None]
        return True, self._per_span(part, seen)

    def _given(self, part: Part, mask: Tensor, stop: int) -> Tensor | None:
        queries = slice(self.first, self.first + self.length)
        rows = part.rows if mask.shape[0] > 1 else slice(None)
        block = mask[rows, :, queries, part.start : stop]
        if block.dtype == torch.bool and bool(block.all()):
            return None
        return self._per_span(part, block)

    def _per_span(self, part: Part, block: Tensor) -> Tensor:
        """``[b, h, Q, P * T]`` to ``[b, P, h / G or 1, G * Q, T]``."""
        spans: Tensor = block.unflatten(-1, (part.spans, part.tokens)).permute(0, 3, 1, 2, 4)
        if spans.shape[2] == 1:
            return spans.repeat(1, 1, 1, self.groups, 1)
        per_head: Tensor = spans.unflatten(2, (-1, self.groups))[:, :, part.heads[0] : part.heads[1]]
        return per_head.flatten(3, 4)


class _Queries:
    """Queries ``[B, H, G * Q, d]`` in the spaces of the parts, each made once, with the keys' means there."""

    def __init__(self, query: Tensor) -> None:
        self.query = query
        self.made: dict[tuple[KeySpace | None, Rotation | None], tuple[Tensor, Tensor | None]] = {}

    def of(self, space: KeySpace | None, tables: Tables) -> tuple[Tensor, Tensor | None]:
        """The queries, and the mean ``[H, d]`` of keys or None."""
        where = (space, tables.rotation)
        if where not in self.made:
            query = self.query if space is None else space.queries(self.query)
            mean = None if space is None else kernels.rotate(space.mean_inside(), tables)
            self.made[where] = kernels.rotate(query, tables), mean
        return self.made[where]


class _Sum:
    """Attention over the parts of one value space so far: ``out [B, H, G * Q, d_value]`` and its lse."""

    def __init__(self, query: Tensor, width: int, tables: Tables) -> None:
        self.out = query.new_zeros((*query.shape[:-1], width))
        self.lse = query.new_full(query.shape[:-1], -torch.inf)
        self.tables = tables

    def add(self, part: Part, outs: Tensor, lses: Tensor) -> None:
        """Adds ``outs [b, P, heads, G * Q, d_value]`` and ``lses [b, P, heads, G * Q]``."""
        where = (part.rows, slice(*part.heads))
        outs = torch.cat([self.out[where].unsqueeze(1), outs], 1).transpose(0, 1)
        lses = torch.cat([self.lse[where].unsqueeze(1), lses], 1).transpose(0, 1)
        self.out[where], self.lse[where] = kernels.merge(outs, lses)

    def finished(self) -> tuple[Tensor, Tensor]:
        """The output in the original space, un-rotated once."""
        return kernels.unrotate(self.out, self.tables), self.lse


def _total(sums: list[_Sum]) -> tuple[Tensor, Tensor]:
    outs, lses = zip(*(part.finished() for part in sums), strict=True)
    if len(outs) == 1:
        return outs[0], lses[0]
    return kernels.merge(torch.stack(outs), torch.stack(lses))
