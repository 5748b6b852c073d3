"""Parts of a layer as a step reads them by `triton_attend.attend_splits`: pages, and the tail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fibkv.kernels.triton_attend import attend_splits
from fibkv.kernels.triton_launch import Kernel, kernel_of
from fibkv.kernels.triton_moving import Kind, Moving
from fibkv.kernels.triton_plan import Group
from fibkv.kernels.triton_queries import Turned
from fibkv.kernels.triton_sides import DeviceTables, Side, on_device, power_of_two
from fibkv.kernels.triton_tuning import Tuning, Tunings
from fibkv.tables import raw_tables

# What a matrix unit takes at least, and rows of queries that a program takes at most: from 64 on Triton 3.6 takes other
# instructions of an H100, and fails to compile operands that are loaded as they are, those of trellis codes.
LEAST, MOST = 16, 32


@dataclass(frozen=True, eq=False)
class TritonPages:
    """Pages of one group.

    Attributes:
        kernel: that reads them.
        grid: of its programs; the first axis has the splits.
        addresses: of the group.
        tables: that the kernel looks codes up in.
        numbers: that it is given first, from the first row to the tiles of a split.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    addresses: Tensor
    tables: _Tables
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, group: Group, mask: str, kind: Kind, tunings: Tunings, room: int) -> Self:
        """The pages of a group.

        Args:
            group: the pages.
            mask: of `Kind.masks`.
            kind: of the queries.
            tunings: of the device.
            room: multiprocessors of the device.
        """
        key, value = group.sides
        tuning = tunings.of(key.kind)
        tile = _tile(group.tokens, tuning)
        rows, heads, queries = kind.sizes
        run_rows, run_heads = group.rows[1] - group.rows[0], group.heads[1] - group.heads[0]
        programs = run_heads * _ceil(queries, _block(queries))
        count, tiles = cut(group.spans * _ceil(group.tokens, tile), tuning.programs * room // (programs * run_rows))
        modes = {
            "PAGED": group.aligned,
            "BIASED": group.space is not None,
            "MASK": mask,
            "SOFTCAP": kind.softcap,
        }
        place = group.rows[0], group.heads[0], run_heads, rows, heads, queries, kind.length
        return cls(
            kernel=_kernel(key, value, kind, tuning, tile, modes),
            grid=(count, programs, run_rows),
            addresses=group.addresses,
            tables=_Tables.of(*(on_device(tables, kind.device) for tables in (group.key_tables, group.value_tables))),
            numbers=(*place, group.start, group.spans, group.tokens, group.tokens, tiles),
        )

    @property
    def splits(self) -> int:
        """How many there are."""
        return self.grid[0]

    def launch(self, turned: Turned, slot: int, moving: Moving) -> None:
        """Writes the splits of a step, from a slot on.

        Raises:
            KernelError: the tuning is one that the device has no room for.
        """
        nothing = self.tables.nothing
        tensors = self.tables.around(turned, self.addresses, (nothing, nothing), moving)
        self.kernel.launch(self.grid, moving.stream, tensors, (*self.numbers, slot, *_moving(moving)))


@dataclass(frozen=True, eq=False)
class Tail:
    """The newest tokens, raw, for all rows and heads.

    Attributes:
        kernel: that reads them.
        rows: B.
        programs: of one row and split.
        tables: of what is not looked up.
        place: the numbers that the kernel is given first, from the first row to Q.
        capacity: tokens that there is room for.
        tile: tokens that a program multiplies at a time.
        most: splits, at most.
    """

    kernel: Kernel
    rows: int
    programs: int
    tables: _Tables
    place: tuple[int, ...]
    capacity: int
    tile: int
    most: int

    @classmethod
    def of(cls, kind: Kind, tunings: Tunings, room: int) -> Self:
        """A tail of a kind; arguments as those of `TritonPages.of`."""
        assert kind.keys is not None
        assert kind.values is not None
        key, value = (raw_tables(held.dtype, held.shape[3]) for held in (kind.keys, kind.values))
        sides = Side.of(key), Side.of(value)
        tuning = tunings.of(sides[0].kind)
        capacity = kind.keys.shape[2]
        # Of the capacity, so that a tail that grows makes no new kernel.
        tile = _tile(capacity, tuning)
        rows, heads, queries = kind.sizes
        programs = heads * _ceil(queries, _block(queries))
        modes = {"PAGED": 0, "BIASED": False, "MASK": kind.masks[-1], "SOFTCAP": kind.softcap}
        return cls(
            kernel=_kernel(*sides, kind, tuning, tile, modes),
            rows=rows,
            programs=programs,
            tables=_Tables.of(on_device(key, kind.device), on_device(value, kind.device)),
            place=(0, 0, heads, rows, heads, queries, kind.length),
            capacity=capacity,
            tile=tile,
            most=tuning.programs * room // (programs * rows),
        )

    def cut(self, tokens: int) -> tuple[int, int]:
        """(splits, tiles of each) of so many tokens."""
        return cut(_ceil(tokens, self.tile), self.most)

    def launch(self, turned: Turned, tail: tuple[Tensor, Tensor, int], length: int, slot: int, moving: Moving) -> None:
        """Writes the splits of a step, from a slot on.

        Args:
            turned: queries as they came.
            tail: see `fibkv.kernels.runs.InPlace.attend_plan`.
            length: tokens of the layer.
            slot: where the first split goes.
            moving: of the step.
        """
        keys, values, tokens = tail
        count, tiles = self.cut(tokens)
        sides = keys.contiguous().view(torch.uint8), values.contiguous().view(torch.uint8)
        numbers = (*self.place, length - tokens, 1, tokens, self.capacity, tiles, slot, *_moving(moving))
        self.kernel.launch(
            (count, self.programs, self.rows),
            moving.stream,
            self.tables.around(turned, self.tables.nothing, sides, moving),
            numbers,
        )


@dataclass(frozen=True, eq=False)
class _Tables:
    """What the kernel looks codes up in: codewords and rotations of keys and of values, float16 and float32.

    Attributes:
        looked_up: codewords and the rotation of the keys, and those of the values.
        nothing: float32, in place of what there is not.
    """

    looked_up: tuple[Tensor, Tensor, Tensor, Tensor]
    nothing: Tensor

    @classmethod
    def of(cls, key: DeviceTables, value: DeviceTables) -> Self:
        nothing = key.codewords
        rotations = [nothing if tables.rotation is None else tables.rotation for tables in (key, value)]
        return cls((key.halves, rotations[0], value.halves, rotations[1]), nothing)

    def around(
        self, turned: Turned, addresses: Tensor, tail: tuple[Tensor, Tensor], moving: Moving
    ) -> tuple[Tensor, ...]:
        """The tensors of a launch, in the kernel's order."""
        query, bias = turned
        bias = self.nothing if bias is None else bias
        mask = self.nothing if moving.mask is None else moving.mask
        return query, bias, addresses, *tail, *self.looked_up, mask, moving.outs, moving.lses


def cut(tiles: int, most: int) -> tuple[int, int]:
    """(splits, tiles of each): at most so many, but one."""
    each = _ceil(tiles, min(max(1, most), tiles))
    return _ceil(tiles, each), each


def _kernel(key: Side, value: Side, kind: Kind, tuning: Tuning, tile: int, modes: Mapping[str, object]) -> Kernel:
    constants = {"KEY": key, "VALUE": value, **modes, "QUERIES": _block(kind.sizes[2]), "TOKENS": tile}
    return kernel_of(attend_splits, kind.device, constants, num_warps=tuning.warps, num_stages=tuning.stages)


def _moving(moving: Moving) -> tuple[float, ...]:
    """The numbers that a kernel is given last."""
    return moving.past, *moving.strides, moving.scale, moving.softcap


def _tile(capacity: int, tuning: Tuning) -> int:
    """Tokens that a program multiplies at a time, of spans of so many."""
    return min(tuning.tokens, max(LEAST, power_of_two(capacity)))


def _block(queries: int) -> int:
    """Queries that a program takes, of so many of a head."""
    return min(MOST, max(LEAST, power_of_two(queries)))


def _ceil(number: int, by: int) -> int:
    return -(-number // by)
