"""How the codes of each codec lie in the memory of a device: what Triton kernels are compiled for, and tables there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fibkv.codes import AffineCodes, Codes, FibCodes, RawCodes, ScaledCodes
from fibkv.errors import KernelError
from fibkv.kernels.candidates import Candidates, candidates
from fibkv.kernels.refusals import mismatch
from fibkv.packing import packed_nbytes
from fibkv.tables import AffineTables, ChannelTables, FibTables, KltTables, PlainTables, RawTables, ScaledTables, Tables

Form = Literal["f32", "f16", "bf16", "int8", "fp8", "affine", "fib"]
Operand = Literal["f16", "tf32", "tf32x3", "ieee"]
FORMS: dict[torch.dtype, Form] = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int8: "int8",
    torch.float8_e4m3fn: "fp8",
}
# What vectors come in; kernels read these as they are.
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Side(NamedTuple):
    """What kernels that read one side, keys or values, are compiled for: a tuple, which Triton takes for a constant.

    Attributes:
        form: of the codes.
        norm: of what a vector is multiplied by: ``log8``, ``f16``, ``bf16`` or ``none``.
        dim: head_dim.
        width: ``D``, the head_dim as a power of two of at least 16, the least that a matrix unit takes.
        nbytes: bytes of a vector's codes.
        operand: in which products with the codes are computed: those of 8 bits or fewer, if not affine, as float16.
        bits: width of an index (fib) or number (affine), else 8.
        window: bits that name a codeword, the index being the newest of them (fib), else as bits.
        block: k, coordinates of a codeword (fib), else 1.
        centered: whether a group has a mean (fib).
        channels: whether a group has channel scales.
        rotated_channels: whether the codes behind them are rotated.
        group: channels of a vector that share a grid (affine); 0 = all tokens of a channel share one.
    """

    form: Form
    norm: Literal["log8", "f16", "bf16", "none"]
    dim: int
    width: int
    nbytes: int
    operand: Operand = "f16"
    bits: int = 8
    window: int = 8
    block: int = 1
    centered: bool = False
    channels: bool = False
    rotated_channels: bool = False
    group: int = 0

    @property
    def kind(self) -> str:
        """What a tuning is kept for."""
        return f"{self.form}{self.block}"

    @classmethod
    def of(cls, tables: Tables) -> Side:
        """The side of a codec.

        Raises:
            KernelError: of klt codes, which are read by other kernels.
        """
        dim = tables.head_dim
        width = max(16, power_of_two(dim))
        match tables:
            case RawTables():
                operand: Operand = "ieee" if tables.dtype == torch.float32 else "tf32"
                return cls(FORMS[tables.dtype], "none", dim, width, dim * tables.dtype.itemsize, operand)
            case ScaledTables():
                return cls(FORMS[tables.dtype], "bf16", dim, width, dim)
            case AffineTables():
                bits, group = tables.bits, 0 if tables.per_channel else tables.group
                nbytes = packed_nbytes(dim, bits)
                # Points of a grid are float32. Of one product of TF32 an H200 was off by 1.02e-3, so it is three.
                return cls("affine", "none", dim, width, nbytes, "tf32x3", bits=bits, window=bits, group=group)
            case FibTables():
                return cls(
                    form="fib",
                    norm=tables.norm_format,
                    dim=dim,
                    width=width,
                    nbytes=packed_nbytes(tables.num_blocks, tables.bits),
                    bits=tables.bits,
                    window=tables.window,
                    block=tables.codewords.shape[1],
                    centered=tables.centered,
                )
            case KltTables():
                raise _unread()
            case ChannelTables():
                rotated = isinstance(tables.inner, FibTables)
                return cls.of(tables.inner)._replace(channels=True, rotated_channels=rotated)


@dataclass(frozen=True, eq=False)
class DeviceTables:
    """Tables of a codec where the kernels are.

    Attributes:
        codewords: ``[N, k]`` float32, N filled up to a power of two; one element where the codec has none.
        halves: the same in float16.
        rotation: ``[d, d]`` float32 or None; row i gives coordinate i of a rotated vector.
        turning: the same transposed and filled up with zeros, ``[D, D]``, D a power of two of at least 32.
        scales: factors of a scale search, float32.
        cells: ``[side, side]`` uint8 of a decision table; one element where there is none.
        candidates: what an exact search in the plane looks at; None for other codecs.
    """

    codewords: Tensor
    halves: Tensor
    rotation: Tensor | None
    turning: Tensor
    scales: Tensor
    cells: Tensor
    candidates: Candidates | None

    def turned(self, vectors: Tensor) -> Tensor:
        """Vectors ``[..., d]`` of any floating dtype, rotated in it."""
        return vectors if self.rotation is None else vectors @ self.rotation.to(vectors.dtype).T

    def back(self, vectors: Tensor) -> Tensor:
        """The inverse of `turned`."""
        return vectors if self.rotation is None else vectors @ self.rotation.to(vectors.dtype)


# Tables are per codec, not per token: a process has few of them.
@lru_cache(maxsize=64)
def on_device(tables: Tables, device: torch.device) -> DeviceTables:
    """Tables copied to a device, once."""
    made = _copied(tables, device)
    if device.type == "cuda":
        # Whoever uses them next may be on another stream.
        torch.cuda.current_stream(device).synchronize()
    return made


def _copied(tables: Tables, device: torch.device) -> DeviceTables:
    inner = tables.inner if isinstance(tables, ChannelTables) else tables
    nothing = torch.zeros(1, dtype=torch.uint8, device=device)
    if not isinstance(inner, FibTables):
        return DeviceTables(nothing.float(), nothing.half(), None, nothing.float(), nothing.float(), nothing, None)
    codewords = inner.codewords.to(device).contiguous()
    filled = pad(codewords, (0, 0, 0, (1 << inner.window) - len(codewords)))
    rotation = inner.rotation.matrix.to(device).contiguous()
    missing = max(32, power_of_two(inner.head_dim)) - inner.head_dim
    plane = codewords.shape[1] == 2 and inner.bits <= 8 and inner.decisions is None and inner.trellis is None
    return DeviceTables(
        filled,
        filled.half(),
        rotation,
        pad(rotation.T, (0, missing, 0, missing)).contiguous(),
        torch.tensor(inner.scales, device=device),
        nothing if inner.decisions is None else inner.decisions.cells.to(device).contiguous(),
        candidates(codewords, inner.scales) if plane else None,
    )


def arrays(codes: Codes, tables: PlainTables | KltTables) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, norms, scales or grids, norm ranges) as kernels read them: contiguous; the codes stand for absent ones.

    Raises:
        KernelError: codes of another codec, or klt codes.
    """
    match codes, tables:
        case RawCodes(), RawTables():
            return (codes.values.contiguous(),) * 3
        case ScaledCodes(), ScaledTables():
            values = codes.values.contiguous()
            return values, codes.scales.contiguous(), values
        case FibCodes(), FibTables():
            indices = codes.indices.contiguous()
            ranges = codes.norm_range.contiguous() if tables.norm_format == "log8" else indices
            return indices, codes.norms.contiguous(), ranges
        case AffineCodes(), AffineTables():
            values = codes.values.contiguous()
            return values, codes.grid.contiguous(), values
        case _, KltTables():
            raise _unread()
        case _:
            raise mismatch(codes, tables)


def _unread() -> KernelError:
    return KernelError("triton kernels: expected codes of another codec than klt, which they do not read")


def octets(tensor: Tensor) -> Tensor:
    """A contiguous tensor as the bytes that kernels take: they know the dtype from their constants."""
    return tensor.view(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(1, dtype=torch.uint8)


def power_of_two(number: int) -> int:
    """The least power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


def per_program(count: int, most: int) -> int:
    """How many of ``count`` things one program takes: a power of two, at most ``most``, which is one too."""
    return max(1, min(power_of_two(count), most))
