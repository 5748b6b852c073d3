"""How the codes of each codec lie in the memory of a device: what Triton kernels are compiled for, and tables there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from fibkv.codes import Codes, FibCodes, RawCodes, ScaledCodes
from fibkv.kernels.refusals import mismatch
from fibkv.packing import packed_nbytes
from fibkv.tables import ChannelTables, FibTables, RawTables, ScaledTables, Tables

Form = Literal["f32", "f16", "bf16", "int8", "fp8", "fib"]
FORMS: dict[torch.dtype, Form] = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int8: "int8",
    torch.float8_e4m3fn: "fp8",
}


@dataclass(frozen=True, slots=True)
class Side:
    """What kernels that read one side, keys or values, are compiled for.

    Attributes:
        form: of the codes.
        norm: of what a vector is multiplied by: ``log8``, ``f16``, ``bf16`` or ``none``.
        dim: head_dim.
        nbytes: bytes of a vector's codes.
        bits: width of an index (fib), else 8.
        block: coordinates of a codeword (fib), else 1.
    """

    form: Form
    norm: Literal["log8", "f16", "bf16", "none"]
    dim: int
    nbytes: int
    bits: int = 8
    block: int = 1

    @classmethod
    def of(cls, tables: RawTables | ScaledTables | FibTables) -> Side:
        """The side of a codec that stands behind no channel scales."""
        match tables:
            case RawTables():
                return cls(FORMS[tables.dtype], "none", tables.head_dim, tables.head_dim * tables.dtype.itemsize)
            case ScaledTables():
                return cls(FORMS[tables.dtype], "bf16", tables.head_dim, tables.head_dim)
            case FibTables():
                nbytes = packed_nbytes(tables.num_blocks, tables.bits)
                return cls("fib", tables.norm_format, tables.head_dim, nbytes, tables.bits, tables.codewords.shape[1])

    @property
    def width(self) -> int:
        """``D``: the head_dim as a power of two of at least 16, the least that a matrix unit takes."""
        return max(16, power_of_two(self.dim))

    def constants(self) -> dict[str, Any]:
        """Arguments of `fibkv.kernels.triton_load.load_directions`."""
        return {
            "FORM": self.form,
            "DIM": self.dim,
            "D": self.width,
            "NBYTES": self.nbytes,
            "BITS": self.bits,
            "BLOCK": self.block,
        }


@dataclass(frozen=True, eq=False)
class DeviceTables:
    """Tables of a codec where the kernels are.

    Attributes:
        codewords: ``[N, k]`` float32; one element where the codec has none.
        rotation: ``[d, d]`` float32 or None; row i gives coordinate i of a rotated vector.
        scales: factors of a scale search, float32.
        cells: ``[side, side]`` uint8 of a decision table; one element where there is none.
    """

    codewords: Tensor
    rotation: Tensor | None
    scales: Tensor
    cells: Tensor

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
    inner = tables.inner if isinstance(tables, ChannelTables) else tables
    nothing = torch.zeros(1, dtype=torch.uint8, device=device)
    if not isinstance(inner, FibTables):
        return DeviceTables(nothing.float(), None, nothing.float(), nothing)
    return DeviceTables(
        inner.codewords.to(device).contiguous(),
        inner.rotation.matrix.to(device).contiguous(),
        torch.tensor(inner.scales, device=device),
        nothing if inner.decisions is None else inner.decisions.cells.to(device).contiguous(),
    )


def arrays(codes: Codes, tables: RawTables | ScaledTables | FibTables) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, norms or scales, norm ranges) as kernels read them: contiguous; the codes stand for absent ones.

    Raises:
        KernelError: codes of another codec.
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
        case _:
            raise mismatch(codes, tables)


def octets(tensor: Tensor) -> Tensor:
    """A contiguous tensor as the bytes that kernels take: they know the dtype from their constants."""
    return tensor.view(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(1, dtype=torch.uint8)


def power_of_two(number: int) -> int:
    """The least power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


def per_program(count: int, most: int) -> int:
    """How many of ``count`` things one program takes: a power of two, at most ``most``, which is one too."""
    return max(1, min(power_of_two(count), most))
