"""Where pages lie on the device: made once per page table, and read at every step without a copy or a wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd

import torch
from torch import Tensor

from fibkv.codes import ChannelCodes, FibCodes
from fibkv.errors import KernelError
from fibkv.kernels.runs import Run
from fibkv.kernels.triton_attend import COLUMNS
from fibkv.kernels.triton_sides import Side, arrays
from fibkv.packed import Held
from fibkv.rotation import Rotation
from fibkv.space import KeySpace
from fibkv.tables import ChannelTables, RawTables, Tables

# The widest load of one thread, in bytes.
ALIGNMENT = 16


@dataclass(frozen=True, eq=False)
class Group:
    """Spans that are read by one launch: P consecutive ones of T tokens, for some rows and KV heads.

    Attributes:
        key_tables: of the keys' codec.
        value_tables: of the values' codec.
        rows: half-open range of batch rows.
        heads: half-open range of KV heads.
        start: first token.
        spans: P.
        tokens: T.
        capacity: tokens that the codes of two heads are apart.
        addresses: ``[rows, P, 2, COLUMNS]`` int64 on the device, of keys and values; None = a tail.
        aligned: a power of two, at most ALIGNMENT, that divides every address of codes; 0 = a tail.
        held: the tensors behind the addresses; of a tail its keys and its values.
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
    capacity: int
    addresses: Tensor | None
    aligned: int
    held: tuple[Tensor, ...]
    rotated: bool = True
    space: KeySpace | None = None

    @classmethod
    def of_run(cls, run: Run) -> Group:
        """Pages. Codes that are not contiguous are copied into memory of the group's own.

        Raises:
            KernelError: pages on several devices.
        """
        held: list[Tensor] = []
        addresses: list[list[int]] = []
        for keys, values in zip(run.keys, run.values, strict=True):
            for key, value in zip(keys, values, strict=True):
                for codes, tables in ((key, run.key_tables), (value, run.value_tables)):
                    tensors = _columns(codes, tables)
                    held += tensors
                    addresses.append([tensor.data_ptr() for tensor in tensors])
        return cls(
            key_tables=run.key_tables,
            value_tables=run.value_tables,
            rows=run.rows,
            heads=run.heads,
            start=run.start,
            spans=len(run.keys[0]),
            tokens=run.tokens,
            capacity=run.tokens,
            addresses=_on_one_device(torch.tensor(addresses).view(len(run.keys), -1, 2, COLUMNS.value), held),
            aligned=gcd(ALIGNMENT, *(entry[0] for entry in addresses)),
            held=tuple(held),
            rotated=run.rotated,
            space=run.space,
        )

    @classmethod
    def of_tail(cls, keys: Tensor, values: Tensor, tokens: int, length: int) -> Group:
        """The newest ``tokens`` of ``length`` tokens, ``keys [B, H, capacity, d]`` and values of their own width."""
        return cls(
            key_tables=_raw_tables(keys.dtype, keys.shape[3]),
            value_tables=_raw_tables(values.dtype, values.shape[3]),
            rows=(0, keys.shape[0]),
            heads=(0, keys.shape[1]),
            start=length - tokens,
            spans=1,
            tokens=tokens,
            capacity=keys.shape[2],
            addresses=None,
            aligned=0,
            held=(keys.contiguous(), values.contiguous()),
        )

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.held[0].device

    @property
    def sides(self) -> tuple[Side, Side]:
        """What kernels are compiled for, of keys and values."""
        return _side(self.key_tables), _side(self.value_tables)

    @property
    def query_rotation(self) -> Rotation | None:
        """What takes queries to the keys' codes."""
        return self.key_tables.rotation if self.rotated else None

    @property
    def out_rotation(self) -> Rotation | None:
        """What takes values to their codes, and back."""
        return self.value_tables.rotation if self.rotated else None


def _columns(codes: Held, tables: Tables) -> list[Tensor]:
    """The tensors of a page's codes, one for each column; the codes stand in for those that a codec lacks."""
    codes = codes.canonical()
    scales: Tensor | None = None
    if isinstance(tables, ChannelTables):
        assert isinstance(codes, ChannelCodes)
        scales, codes, tables = codes.channel_scales.contiguous(), codes.inner, tables.inner
    data, norms, ranges = arrays(codes, tables)
    means = codes.mean.contiguous() if isinstance(codes, FibCodes) and codes.mean.numel() else data
    return [data, norms, ranges, means, data if scales is None else scales]


def _on_one_device(addresses: Tensor, held: Sequence[Tensor]) -> Tensor:
    devices = {tensor.device for tensor in held}
    if len(devices) > 1:
        raise KernelError(f"pages: expected all of them on one device, got {sorted(map(str, devices))}")
    (device,) = devices
    # Pinned, so that the copy is not waited for.
    return addresses.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else addresses


@lru_cache(maxsize=256)
def _side(tables: Tables) -> Side:
    return Side.of(tables)


@lru_cache(maxsize=64)
def _raw_tables(dtype: torch.dtype, head_dim: int) -> RawTables:
    return RawTables(dtype=dtype, head_dim=head_dim)
