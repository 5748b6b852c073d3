"""Where pages lie on the device: made once per page table, and read at every step without a copy or a wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from struct import Struct
from typing import Self
from weakref import ref

import torch
from torch import Tensor

from fibkv.codes import ChannelCodes, Codes, FibCodes
from fibkv.errors import KernelError
from fibkv.kernels.runs import Run
from fibkv.kernels.triton_attend import COLUMNS
from fibkv.kernels.triton_sides import Side, arrays
from fibkv.packed import Held
from fibkv.rotation import Rotation
from fibkv.space import KeySpace
from fibkv.tables import ChannelTables, Tables

# The widest load of one thread, in bytes.
ALIGNMENT = 16
# Of a table of addresses.
ROW = Struct(f"{COLUMNS.value}q")


@dataclass(frozen=True, eq=False)
class Group:
    """Pages that are read by one launch: P consecutive spans of T tokens, for some rows and KV heads.

    Attributes:
        key_tables: of the keys' codec.
        value_tables: of the values' codec.
        rows: half-open range of batch rows.
        heads: half-open range of KV heads.
        start: first token.
        spans: P.
        tokens: T, which are also what the codes of two heads are apart.
        addresses: ``[rows, P, 2, COLUMNS]`` int64 on the device, of keys and values.
        aligned: a power of two, at most ALIGNMENT, that divides every address of codes.
        held: what is behind the addresses, span by span, keys before values.
        rotated: see `fibkv.kernels.runs.Run`.
        space: of the keys.
    """

    key_tables: Tables
    value_tables: Tables
    rows: tuple[int, int]
    heads: tuple[int, int]
    start: int
    spans: int
    tokens: int
    addresses: Tensor
    aligned: int
    held: tuple[Placed, ...]
    rotated: bool = True
    space: KeySpace | None = None

    @classmethod
    def of_run(cls, run: Run) -> Group:
        """Pages. Codes that are not contiguous are copied into memory of the group's own.

        Raises:
            KernelError: pages on several devices.
        """
        held: list[Placed] = []
        for keys, values in zip(run.keys, run.values, strict=True):
            for key, value in zip(keys, values, strict=True):
                held.append(_placed(key, run.key_tables))
                held.append(_placed(value, run.value_tables))
        return cls(
            key_tables=run.key_tables,
            value_tables=run.value_tables,
            rows=run.rows,
            heads=run.heads,
            start=run.start,
            spans=len(run.keys[0]),
            tokens=run.tokens,
            addresses=_on_device(held).view(len(run.keys), -1, 2, COLUMNS.value),
            aligned=gcd(*{placed.aligned for placed in held}),
            held=tuple(held),
            rotated=run.rotated,
            space=run.space,
        )

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.addresses.device

    @property
    def stop(self) -> int:
        """Behind the last token."""
        return self.start + self.spans * self.tokens

    @property
    def sides(self) -> tuple[Side, Side]:
        """What kernels are compiled for, of keys and values."""
        return Side.of(self.key_tables), Side.of(self.value_tables)

    @property
    def query_rotation(self) -> Rotation | None:
        """What takes queries to the keys' codes."""
        return self.key_tables.rotation if self.rotated else None

    @property
    def out_rotation(self) -> Rotation | None:
        """What takes values to their codes, and back."""
        return self.value_tables.rotation if self.rotated else None


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """Codes of one side of a span, and where they are.

    Attributes:
        tensors: one for each column of a table of addresses.
        row: of the table, as bytes.
        aligned: a power of two, at most ALIGNMENT, that divides the address of the codes.
        device: of the tensors.
    """

    tensors: tuple[Tensor, ...]
    row: bytes
    aligned: int
    device: torch.device

    @classmethod
    def of(cls, codes: Codes, tables: Tables) -> Self:
        """Codes in canonical order; those that are not contiguous are copied."""
        tensors = _columns(codes, tables)
        addresses = [tensor.data_ptr() for tensor in tensors]
        return cls(tensors, ROW.pack(*addresses), gcd(ALIGNMENT, addresses[0]), tensors[0].device)


# Pages are planned anew whenever one comes behind them; each is asked once where it is. A `WeakKeyDictionary` would do
# this too, in three times as long.
_known: dict[ref[Codes], Placed] = {}


def _placed(codes: Held, tables: Tables) -> Placed:
    # Of codes in another order these are a copy, of which nothing is known.
    codes = codes.canonical()
    found = _known.get(ref(codes))
    if found is None:
        found = Placed.of(codes, tables)
        # A copy of codes that are not contiguous is one of what lies there now.
        if all(tensor.is_contiguous() for _, tensor in codes.named()):
            _known[ref(codes, _forget)] = found
    return found


def _forget(codes: ref[Codes]) -> None:
    _known.pop(codes, None)


def _columns(codes: Codes, tables: Tables) -> tuple[Tensor, ...]:
    """The tensors of a page's codes, one for each column; the codes stand in for those that a codec lacks."""
    scales: Tensor | None = None
    if isinstance(tables, ChannelTables):
        assert isinstance(codes, ChannelCodes)
        scales, codes, tables = codes.channel_scales.contiguous(), codes.inner, tables.inner
    data, norms, ranges = arrays(codes, tables)
    means = codes.mean.contiguous() if isinstance(codes, FibCodes) and codes.mean.numel() else data
    return data, norms, ranges, means, data if scales is None else scales


def _on_device(held: Sequence[Placed]) -> Tensor:
    """The table of addresses, where the codes are."""
    devices = {placed.device for placed in held}
    if len(devices) > 1:
        raise KernelError(f"pages: expected all of them on one device, got {sorted(map(str, devices))}")
    (device,) = devices
    table = torch.frombuffer(bytearray().join([placed.row for placed in held]), dtype=torch.int64)
    # Pinned, so that the copy is not waited for.
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
