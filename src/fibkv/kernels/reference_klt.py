"""Pairs of coordinates with a static number of bits each, in plain torch: what `fibkv.kernels.reference` does with klt.

Shapes: rows ``[..., H, T, d]`` with the heads of the tables, or any leading axes where these have one head; ``m`` =
d / 2 pairs; indices ``[..., m]`` int32 count within the codebook of their pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

from fibkv.constants import constant
from fibkv.errors import KernelError
from fibkv.kernels.nearest import nearest
from fibkv.packing import octets
from fibkv.tables import KltTables, start_of


class Found(NamedTuple):
    """Indices of vectors, and of what they stand for the weighted <u, q> and <q, q>, ``[...]`` float64."""

    indices: Tensor
    along: Tensor
    energy: Tensor


def require_heads(shape: torch.Size, tables: KltTables) -> None:
    """Refuses vectors ``[..., H, T, d]``, or codes ``[..., H, T, bytes]``, of another number of heads than the tables'.

    Raises:
        KernelError: with both.
    """
    if tables.heads > 1 and (len(shape) < 3 or shape[-3] != tables.heads):
        raise KernelError(f"klt codes of {tables.heads} heads: expected shape [..., heads, T, ...], got {list(shape)}")


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """What follows from an allocation, on a device. Of heads: ``[H, 1, n]`` beside vectors ``[..., H, T, d]``, of one
    head ``[n]``.

    Attributes:
        coded: bool, n = d: coordinates that have bits.
        weights: float64, n = d.
        starts: int64, n = m: where the codewords of the pairs begin.
        pairs: int64, n = bits of a vector: the pair that a bit of the code belongs to.
        places: int32, the same: its place in the pair's index.
        groups: for each head and width the pairs ``[p]`` int64 that have it.
    """

    coded: Tensor
    weights: Tensor
    starts: Tensor
    pairs: Tensor
    places: Tensor
    groups: tuple[tuple[int, int, Tensor], ...]


# One per layer of a calibrated model, and a few for ranges of its heads.
@lru_cache(maxsize=512)
def _plan(tables: KltTables, device: torch.device) -> _Plan:
    bits = tables.bits.to(torch.int64)

    def beside(of_heads: Tensor) -> Tensor:
        numbers = of_heads.to(device)
        return numbers[0] if len(numbers) == 1 else numbers.unsqueeze(-2)

    return _Plan(
        coded=beside(bits > 0).repeat_interleave(2, -1),
        weights=beside(tables.weights.to(torch.float64)).repeat_interleave(2, -1),
        starts=beside(torch.tensor([[start_of(width) for width in widths] for widths in bits.tolist()])),
        pairs=beside(torch.stack([torch.arange(len(widths)).repeat_interleave(widths) for widths in bits])),
        places=beside(torch.stack([torch.cat([torch.arange(int(w)) for w in widths]) for widths in bits]).int()),
        groups=tuple(
            (head, width, (widths == width).nonzero().flatten().to(device))
            for head, widths in enumerate(bits)
            for width in widths.unique().tolist()
        ),
    )


def units(rows: Tensor, tables: KltTables) -> tuple[Tensor, Tensor]:
    """Rows ``[..., T, d]`` float32 as vectors whose coded coordinates have a mean square of 1, and their norms.

    Coordinates without bits decode to zero whatever they are, and have no say in it.

    Returns:
        ``[..., T, d]`` float32, and ``[..., T]`` float64.
    """
    # The squares of float32 numbers neither overflow nor vanish in float64.
    wide = rows.to(torch.float64)
    coded = _plan(tables, rows.device).coded
    length = ((wide.square() * coded).sum(-1) / coded.sum(-1)).sqrt()
    unit = wide / length.masked_fill(length == 0, 1.0).unsqueeze(-1)
    return unit.masked_fill(~coded, 0.0).to(torch.float32), length


def search(unit: Tensor, tables: KltTables) -> Found:
    """Indices for `units`: of each factor's the ones whose direction fits best, errors weighted by variance."""
    first, *others = (_fit(unit, _codewords(unit * scale, tables), tables) for scale in tables.scales)
    best = first
    for found in others:
        better = _cosine(found) > _cosine(best)
        best = Found(
            torch.where(better.unsqueeze(-1), found.indices, best.indices),
            torch.where(better, found.along, best.along),
            torch.where(better, found.energy, best.energy),
        )
    return best


def gain(found: Found) -> Tensor:
    """The g >= 0 that makes the weighted |u - g q|^2 smallest, ``[...]`` float64; 0 for q = 0."""
    return (found.along / found.energy.masked_fill(found.energy == 0, 1.0)).clamp(min=0.0)


def directions(indices: Tensor, tables: KltTables) -> Tensor:
    """What indices ``[..., m]`` stand for, ``[..., d]`` float32, before norms."""
    codewords = constant(tables.codewords, indices.device)
    return embedding(indices + _plan(tables, indices.device).starts, codewords).flatten(-2)


def pack(indices: Tensor, tables: KltTables) -> Tensor:
    """Indices as a little-endian bit stream per vector, pair by pair with its own width, ``[..., bytes]`` uint8."""
    plan = _plan(tables, indices.device)
    wanted = indices.gather(-1, plan.pairs.expand(*indices.shape[:-1], -1))
    return octets(((wanted >> plan.places) & 1).to(torch.uint8))


def unpack(packed: Tensor, tables: KltTables) -> Tensor:
    """The inverse of `pack`."""
    plan = _plan(tables, packed.device)
    eight = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = ((packed.unsqueeze(-1) >> eight) & 1).flatten(-2)[..., : plan.pairs.shape[-1]].to(torch.int32)
    indices = torch.zeros(*packed.shape[:-1], tables.bits.shape[-1], dtype=torch.int32, device=packed.device)
    return indices.scatter_add_(-1, plan.pairs.expand(stream.shape), stream << plan.places)


def _codewords(vectors: Tensor, tables: KltTables) -> Tensor:
    """Indices ``[..., m]`` int32 of the codewords nearest to the pairs of ``vectors [..., T, d]`` float32."""
    blocks = vectors.unflatten(-1, (-1, 2))
    codewords = constant(tables.codewords, vectors.device)
    found = torch.zeros(blocks.shape[:-1], dtype=torch.int32, device=vectors.device)
    for head, width, pairs in _plan(tables, vectors.device).groups:
        of_head = (Ellipsis,) if tables.heads == 1 else (Ellipsis, head, slice(None))
        start = start_of(width)
        those = blocks[(*of_head, pairs, slice(None))]
        nearby = nearest(those.reshape(-1, 2), codewords[start : start + (1 << width)])
        found[(*of_head, pairs)] = nearby.view(those.shape[:-1])
    return found


def _fit(unit: Tensor, indices: Tensor, tables: KltTables) -> Found:
    quantized = directions(indices, tables).to(torch.float64)
    weighted = quantized * _plan(tables, unit.device).weights
    return Found(indices, (unit.to(torch.float64) * weighted).sum(-1), (quantized * weighted).sum(-1))


def _cosine(found: Found) -> Tensor:
    """The cosine of the angle between u and q, but for |u|; 0 for q = 0."""
    return found.along / found.energy.masked_fill(found.energy == 0, 1.0).sqrt()
