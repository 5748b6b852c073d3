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
from math import sqrt
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fibkv.contract import MarkedContract
from fibkv.errors import CodebookError, ContractError
from fibkv.trellis_search import CELLS_PER_UNIT, SearchTable, search_table

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
        if len(self.levels) != (size := max(64, 4**self.bits)):
            raise ContractError("TrellisCode.levels", f"{size} of them", len(self.levels))
        if any(column >= len(self.levels) for column in self.columns):
            raise ContractError("TrellisCode.columns", f"labels below {len(self.levels)}", self.columns)
        # At 2 bits: then any four neighbouring groups of states use all levels, which the encoder relies on.
        above = [column >> 2 * self.bits for column in self.columns[: self.label_bits - 2 * self.bits]]
        if above and (0 in above or above[0] == above[1]):
            expected = "two first ones that differ in their highest bits, from 0 and from each other"
            raise ContractError("TrellisCode.columns", expected, self.columns)
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
        codewords: ``[2^L, 1]`` float32, the level of each window, in units of a vector of norm 1.
        search: what the encoder tries for a coordinate.
        cells: the encoder's cells in 1, the length of a unit vector: sqrt(d) * CELLS_PER_UNIT.
        overlap: coordinates on both sides of the vector's ends that the encoder looks at to close it to a ring.
    """

    code: TrellisCode
    labels: Tensor
    codewords: Tensor
    search: SearchTable
    cells: float
    overlap: int

    @property
    def ways(self) -> int:
        """Levels that the encoder tries for each state."""
        return self.search.columns.shape[1]

    @classmethod
    def of(cls, code: TrellisCode, head_dim: int, overlap: int, ways: int = 3) -> Trellis:
        """The code for vectors of ``head_dim`` coordinates.

        An overlap is at most half of them; ``ways`` are the levels that the encoder tries for each state, 2 or 3.
        """
        cells = sqrt(head_dim) * CELLS_PER_UNIT
        return cls(code, *_tensors(code, head_dim), _search(code, ways), cells, min(overlap, head_dim // 2))


# Once for all settings of an encoder: caches count what they share once.
@lru_cache(maxsize=64)
def _tensors(code: TrellisCode, head_dim: int) -> tuple[Tensor, Tensor]:
    """Labels of windows, and their levels as codewords."""
    labels, levels = code.labels(), torch.tensor(code.levels, dtype=torch.int32)
    codewords = (levels[labels].to(torch.float64) / (sqrt(head_dim) * GRID)).to(torch.float32).unsqueeze(-1)
    return labels.to(torch.uint8), codewords


# Of all dimensions: cells are in units of a coordinate's standard deviation.
@lru_cache(maxsize=64)
def _search(code: TrellisCode, ways: int) -> SearchTable:
    return search_table(code.bits, torch.tensor(code.levels), GRID, ways)


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
