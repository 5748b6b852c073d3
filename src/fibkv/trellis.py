"""Trellis codes as values and as files: which level each window of a bit stream stands for.

Every coordinate of a vector puts b new bits into a window of b + 8, and the window stands for a level. Neighbouring
windows share 8 bits, so that choosing one symbol shapes the next three coordinates or four: a code of many dimensions
that is read by looking one number up. The window wraps around the vector: there is no start to store, and a vector of d
coordinates takes b * d bits exactly.

The idea of a trellis whose states are the last bits is that of QTIP (arXiv 2406.11235); tail-biting is classical.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from math import isqrt, sqrt
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fibkv.contract import MarkedContract
from fibkv.errors import CodebookError, ContractError

STATE_BITS = 8
"""Bits that neighbouring windows share: 256 states."""

GRID = 4096
"""Levels are whole numbers of 1 / GRID, in units in which a coordinate has variance 1."""

Bits = Literal[2, 3, 4]
Label = Annotated[int, Field(ge=0, lt=256)]
Level = Annotated[int, Field(gt=-(2**15), lt=2**15)]


class TrellisCode(MarkedContract):
    """A code of b = ``bits`` bits per coordinate.

    A window is b new bits (its highest), 8 - b middle ones and the b oldest. Its label is the exclusive or of the b
    oldest bits, of the b new ones shifted by b, and of ``columns[i]`` for each middle bit i that is set; its level is
    ``levels[label]``. The map from windows to labels is linear over GF(2), so that byte arithmetic can follow it.

    Raises:
        ContractError: on construction, for a number of columns or levels that does not fit, or a label out of range.
    """

    schema_version: Literal["fibkv_trellis_code_v1"] = "fibkv_trellis_code_v1"
    bits: Bits
    columns: tuple[Label, ...]
    levels: tuple[Level, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.columns) != STATE_BITS - self.bits:
            raise ContractError("TrellisCode.columns", f"{STATE_BITS - self.bits} of them", len(self.columns))
        if self.label_bits < 2 * self.bits or 1 << self.label_bits != len(self.levels) or self.label_bits > STATE_BITS:
            expected = f"a power of two between {4**self.bits} and {1 << STATE_BITS} of them"
            raise ContractError("TrellisCode.levels", expected, len(self.levels))
        if any(column >= len(self.levels) for column in self.columns):
            raise ContractError("TrellisCode.columns", f"labels below {len(self.levels)}", self.columns)
        return self

    @property
    def label_bits(self) -> int:
        """Width of a label."""
        return len(self.levels).bit_length() - 1

    @property
    def window_bits(self) -> int:
        """L, the width of a window."""
        return self.bits + STATE_BITS

    def labels(self) -> Tensor:
        """Labels ``[2^L]`` int64 of all windows."""
        windows = torch.arange(1 << self.window_bits)
        oldest = windows % (1 << self.bits)
        labels = oldest | windows >> STATE_BITS << self.bits
        for place, column in enumerate(self.columns):
            labels = labels ^ (windows >> (self.bits + place) & 1) * column
        return labels


@dataclass(frozen=True, slots=True, eq=False)
class Trellis:
    """A trellis code as kernels use it, for vectors of one dimension.

    Attributes:
        code: its meaning.
        labels: ``[2^L]`` uint8, of each window.
        levels: ``[2^m]`` int32, of each label, in steps of the grid.
        codewords: ``[2^L, 1]`` float32, the level of each window, in units of a vector of norm 1.
        steps: steps of the grid in 1, the length of a unit vector: sqrt(d) * GRID.
        overlap: coordinates on both sides of the vector's ends that the encoder looks at to close it to a ring.
    """

    code: TrellisCode
    labels: Tensor
    levels: Tensor
    codewords: Tensor
    steps: float
    overlap: int

    @classmethod
    def of(cls, code: TrellisCode, head_dim: int, overlap: int) -> Trellis:
        """The code for vectors of ``head_dim`` coordinates; an overlap is at most half of them."""
        return cls(code, *_tensors(code, head_dim), _steps(head_dim), min(overlap, head_dim // 2))

    @property
    def most(self) -> int:
        """The largest squared distance of a coordinate to a level in the encoder's costs, a multiple of 2^b.

        A state is forgotten after ``ceil(8 / b)`` symbols, so that costs of states differ by so many distances at most;
        with one more to add they are 16 bits wide.
        """
        return ((1 << 16) - 1) // (self._memory + 1) & -(1 << self.code.bits)

    @property
    def far_cost(self) -> int:
        """The cost of states that no path has reached."""
        return self._memory * self.most

    @property
    def farthest(self) -> int:
        """The distance behind `most`, in steps of the grid: what is farther costs no more.

        Finer costs would make it shorter than what the best path may have to take; coarser ones lose by rounding.
        """
        return isqrt(((self.most + 1) << 16) - 1) >> self.code.bits - 1

    @property
    def reach(self) -> int:
        """The largest coordinate that the encoder tells from larger ones, in steps of the grid.

        It is above the outermost level by half of the farthest distance: what is beyond costs more at any level, but
        nearly as much more at each.
        """
        return max(map(abs, self.code.levels)) + self.farthest // 2

    @property
    def _memory(self) -> int:
        return -(-STATE_BITS // self.code.bits)


def _steps(head_dim: int) -> float:
    return sqrt(head_dim) * GRID


# Once for all settings of an encoder: caches count what they share once.
@lru_cache(maxsize=64)
def _tensors(code: TrellisCode, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels of windows, levels of labels, and levels of windows as codewords."""
    labels, levels = code.labels(), torch.tensor(code.levels, dtype=torch.int32)
    codewords = (levels[labels].to(torch.float64) / _steps(head_dim)).to(torch.float32).unsqueeze(-1)
    return labels.to(torch.uint8), levels, codewords


@lru_cache(maxsize=8)
def load(bits: int) -> TrellisCode:
    """The code that fibkv ships for a number of bits.

    Raises:
        CodebookError: there is none, or its file cannot be read or is damaged.
    """
    path = files("fibkv") / "data" / "trellis" / f"trellis{bits}.json"
    try:
        code = TrellisCode.from_json(path.read_bytes())
    except (OSError, ContractError) as error:
        raise CodebookError(f"trellis code of {bits} bits: cannot be read: {error}") from error
    if code.bits != bits:
        raise CodebookError(f"trellis code {path}: expected {bits} bits, got {code.bits}")
    return code
