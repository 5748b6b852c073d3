"""Codes in the order in which native kernels read them: the resident form of a page's codes.

The canonical order (`fibkv.codes`) is what is hashed, stored and sent; this one lives in memory only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fibkv.codes import AffineChannelCodes, AffineCodes, ChannelCodes, Codes, FibCodes, RawCodes, ScaledCodes
from fibkv.errors import KernelError
from fibkv.packing import packed_nbytes
from fibkv.tables import AffineTables, ChannelTables, FibTables, KltTables, RawTables, ScaledTables, Tables

NOTHING = torch.empty(0)


@dataclass(frozen=True, slots=True, eq=False)
class PackedForm:
    """How the codes of a rectangle (heads x tokens) lie in a block: shared by blocks that are alike.

    Attributes:
        start: of their run of bytes in the block.
        heads: number of heads.
        tokens: number of tokens.
        tables: of the codec.
        side: the native object that knows the order (`fibkv.kernels.native_sides.side_of`).
        nbytes: of the run, the padding of tiles included.
    """

    start: int
    heads: int
    tokens: int
    tables: Tables
    side: Any
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbytes", self.side.nbytes(self.heads, self.tokens))


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Codes of a rectangle (heads x tokens) as one run of bytes.

    Attributes:
        block: uint8 on the CPU, the memory that they lie in; they keep it alive.
        form: where in it, and how.
    """

    block: Tensor
    form: PackedForm

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.form.heads

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.form.tokens

    @property
    def side(self) -> Any:
        """The native object that knows the order."""
        return self.form.side

    @property
    def nbytes(self) -> int:
        """Bytes of the run."""
        return self.form.nbytes

    @property
    def data(self) -> Tensor:
        """``[nbytes]`` uint8, a view of the block."""
        return self.block[self.form.start : self.form.start + self.form.nbytes]

    @property
    def address(self) -> int:
        """Of the run, for as long as this object lives."""
        return self.block.data_ptr() + self.form.start

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return self.block.device

    def canonical(self) -> Codes:
        """The codes in canonical order ``[heads, tokens, ...]``, newly allocated."""
        codes = empty_codes(self.form.tables, self.heads, self.tokens)
        self.side.unpack(self.heads, self.tokens, self.address, *(part.data_ptr() for part in parts_of(codes)))
        return codes

    def to_bytes(self) -> memoryview:
        """The canonical bytes, as `fibkv.codecs.Codec.to_bytes` gives them."""
        out = memoryview(bytearray(self.side.canonical_nbytes(self.heads, self.tokens)))
        self.side.unpack_runs(self.heads, self.tokens, [self.address], [out])
        return out

    def store(self, codes: Codes) -> None:
        """Overwrites the bytes with other codes of the same rectangle.

        Raises:
            KernelError: codes that are not on the CPU.
        """
        if codes.device.type != "cpu":
            raise KernelError(f"native kernels: expected codes on the CPU, got some on {codes.device}")
        parts = [part.contiguous() for part in parts_of(codes)]  # which hold what is read by address
        self.side.pack(self.heads, self.tokens, *(part.data_ptr() for part in parts), self.address)

    def to(self, device: torch.device) -> Codes | Packed:
        """Itself on the CPU, canonical codes on any other device."""
        return self if device == self.device else self.canonical().to(device)

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process may have other kernels: what travels is canonical.
        return _identity, (self.canonical(),)


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """Codes of a rectangle in their canonical bytes where they were read: on their way to memory of their own.

    Attributes:
        data: the bytes, checked; it keeps alive what it is a view of.
        heads: number of heads.
        tokens: number of tokens.
        read: the codec's `fibkv.codecs.Codec.from_bytes`.
    """

    data: memoryview
    heads: int
    tokens: int
    read: Callable[[memoryview, int, int], Codes]

    @property
    def nbytes(self) -> int:
        """Bytes of the codes."""
        return len(self.data)

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def canonical(self) -> Codes:
        """The codes ``[heads, tokens, ...]``, copied."""
        return self.read(self.data, self.heads, self.tokens)

    def to_bytes(self) -> memoryview:
        """The canonical bytes."""
        return self.data

    def to(self, device: torch.device) -> Codes | Stored:
        """Itself on the CPU, canonical codes on any other device."""
        return self if device == self.device else self.canonical().to(device)

    def __reduce__(self) -> tuple[Any, ...]:
        return _identity, (self.canonical(),)


Held = Codes | Packed | Stored
"""What a segment of a page can hold."""


def write_runs(packed: Sequence[Packed], places: Sequence[memoryview]) -> None:
    """Writes canonical bytes of many codes: of those that are alike by one call, without a tensor for any of them.

    Args:
        packed: codes.
        places: for each as many writable bytes as `Packed.to_bytes` gives.
    """
    alike: dict[tuple[Any, int, int], tuple[list[int], list[memoryview]]] = {}
    for one, place in zip(packed, places, strict=True):
        form = one.form
        addresses, runs = alike.setdefault((form.side, form.heads, form.tokens), ([], []))
        addresses.append(one.address)
        runs.append(place)
    for (side, heads, tokens), (addresses, runs) in alike.items():
        side.unpack_runs(heads, tokens, addresses, runs)


def _identity(codes: Codes) -> Codes:
    return codes


def empty_codes(tables: Tables, heads: int, tokens: int) -> Codes:
    """Uninitialized canonical codes ``[heads, tokens, ...]`` of a codec."""
    match tables:
        case RawTables():
            return RawCodes(torch.empty(heads, tokens, tables.head_dim, dtype=tables.dtype))
        case ScaledTables():
            scales = torch.empty(heads, tokens, dtype=torch.bfloat16)
            return ScaledCodes(scales, torch.empty(heads, tokens, tables.head_dim, dtype=tables.dtype))
        case AffineTables():
            values = torch.empty(heads, tokens, packed_nbytes(tables.head_dim, tables.bits), dtype=torch.uint8)
            if tables.per_channel:
                return AffineChannelCodes(torch.empty(heads, tables.head_dim, 2, dtype=torch.float16), values)
            return AffineCodes(torch.empty(heads, tokens, tables.groups, 2, dtype=torch.float16), values)
        case FibTables() | KltTables():
            log8 = tables.norm_format == "log8"
            return FibCodes(
                mean=torch.empty(heads, 1 + tables.head_dim if tables.centered else 0, dtype=torch.int8),
                norm_range=torch.empty(heads, 2 if log8 else 0, dtype=torch.float16),
                norms=torch.empty(heads, tokens, dtype=torch.uint8 if log8 else torch.float16),
                indices=torch.empty(heads, tokens, tables.code_nbytes, dtype=torch.uint8),
            )
        case ChannelTables():
            scales = torch.empty(heads, tables.head_dim, dtype=torch.bfloat16)
            return ChannelCodes(scales, empty_codes(tables.inner, heads, tokens))


def parts_of(codes: Codes) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(codes, norms, norm ranges, channel scales, means); absent ones are empty.

    Scales of vectors, and grids, stand where norms do; grids of channels where scales of channels do.
    """
    match codes:
        case ChannelCodes():
            payload, norms, ranges, _, means = parts_of(codes.inner)
            return payload, norms, ranges, codes.channel_scales, means
        case FibCodes():
            return codes.indices, codes.norms, codes.norm_range, NOTHING, codes.mean
        case AffineChannelCodes():
            return codes.values, NOTHING, NOTHING, codes.grid, NOTHING
        case AffineCodes():
            return codes.values, codes.grid, NOTHING, NOTHING, NOTHING
        case ScaledCodes():
            return codes.values, codes.scales, NOTHING, NOTHING, NOTHING
        case RawCodes():
            return codes.values, NOTHING, NOTHING, NOTHING, NOTHING
    raise TypeError(f"unknown codes: {type(codes).__name__}")
