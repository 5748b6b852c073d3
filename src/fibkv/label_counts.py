"""How often the labels of a trellis code occur in what it codes: their levels are rounded for attention by it."""

from __future__ import annotations

from importlib.resources import files
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fibkv.contract import MarkedContract
from fibkv.digest import Digest
from fibkv.errors import CodebookError, ContractError
from fibkv.trellis import TrellisCode


class LabelCounts(MarkedContract):
    """The labels that the encoder gave to random vectors, counted by `tools/train_trellis.py`.

    Attributes:
        code: digest of the code.
        counts: of each label.
    """

    schema_version: Literal["fibkv_label_counts_v1"] = "fibkv_label_counts_v1"
    code: Digest
    counts: tuple[Annotated[int, Field(gt=0)], ...]


def label_frequencies(code: TrellisCode) -> Tensor:
    """The parts ``[2^m]`` float64 that labels have among all. Labels of a code that is not shipped count as equal.

    Raises:
        CodebookError: the counts of a shipped code cannot be read or are damaged.
    """
    path = files("fibkv") / "data" / "trellis" / f"counts{code.bits}.json"
    try:
        counted = LabelCounts.from_json(path.read_bytes())
    except (OSError, ContractError) as error:
        raise CodebookError(f"label counts of {code.bits} bits: cannot be read: {error}") from error
    if counted.code != code.digest():
        return torch.full((len(code.levels),), 1 / len(code.levels), dtype=torch.float64)
    if len(counted.counts) != len(code.levels):
        raise CodebookError(f"label counts {path}: expected {len(code.levels)} of them, got {len(counted.counts)}")
    counts = torch.tensor(counted.counts, dtype=torch.float64)
    return counts / counts.sum()
