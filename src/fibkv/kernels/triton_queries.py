"""Queries in the spaces of the keys' codes: which there are is decided once, each is made once per step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fibkv.kernels.triton_launch import ALIGNMENT
from fibkv.kernels.triton_merge import Turn
from fibkv.kernels.triton_moving import Kind
from fibkv.kernels.triton_plan import Group
from fibkv.kernels.triton_sides import FLOATS, on_device
from fibkv.rotation import Rotation
from fibkv.space import KeySpace

# Queries for some keys, of ``[B, H, G * Q, d]`` float32, and what the keys' mean adds, ``[B, H, G * Q]``, or None.
Turned = tuple[Tensor, Tensor | None]


class _Way(NamedTuple):
    """How queries get to one space: through the layer's, then by a rotation."""

    space: KeySpace | None
    turn: Turn | None


class Queries:
    """Takes queries of one kind to every space that groups of pages have keys in.

    Attributes:
        count: of all rows and heads.
    """

    def __init__(self, groups: Sequence[Group], kind: Kind) -> None:
        self._dtype = kind.dtype if kind.dtype in FLOATS else torch.float32
        self.count = kind.shape[:3].numel()
        self._grouped = (*kind.sizes, kind.shape[3])
        self._places: dict[tuple[KeySpace | None, Rotation | None], int] = {(None, None): 0}
        self._ways: list[_Way] = []
        self._first: Turn | None = None
        for group in groups:
            where = group.space, group.query_rotation
            if where in self._places:
                continue
            space = None if group.space is None else _space_on(group.space, kind.device)
            turn = None
            if group.query_rotation is not None:
                rotation = on_device(group.key_tables, kind.device).rotation
                assert rotation is not None
                # The first launch takes queries as they come, and widens them.
                is_first = space is None and self._first is None
                turn = Turn.of(self._dtype if is_first else torch.float32, rotation)
                self._first = turn if is_first else self._first
            self._places[where] = len(self._places)
            self._ways.append(_Way(space, turn))

    def place(self, group: Group) -> int:
        """Where the queries for a group are in what a call returns; at 0 they are as they came."""
        return self._places[group.space, group.query_rotation]

    def __call__(self, query: Tensor, stream: int) -> list[Turned]:
        """Queries ``[B, Hq, Q, d]`` as they came, in float32, and in each space."""
        if self._first is None:
            plain = _aligned(query.to(torch.float32).contiguous())
        else:
            plain, turned = self._first(query.to(self._dtype).contiguous(), stream)
        made: list[Turned] = [(plain, None)]
        for space, turn in self._ways:
            if turn is not None and turn is self._first:
                made.append((turned, None))
                continue
            inside, bias = plain, None
            if space is not None:
                grouped = plain.view(self._grouped)
                bias = (grouped @ space.mean.unsqueeze(-1)).squeeze(-1).contiguous()
                inside = space.queries(grouped).contiguous()
            made.append((inside if turn is None else turn(inside, stream)[1], bias))
        return made


def _aligned(query: Tensor) -> Tensor:
    # Kernels in CUDA C++ read four numbers at a time.
    return query if query.data_ptr() % ALIGNMENT == 0 else query.clone()


@lru_cache(maxsize=64)
def _space_on(space: KeySpace, device: torch.device) -> KeySpace:
    return space.to(device)
