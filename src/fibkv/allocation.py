"""Static bit allocations: how many bits each pair of coordinates gets, the same for every key of a head.

They belong to keys in the space of a Karhunen-Loeve transform (`fibkv.calibration.Klt`), whose coordinates fall in
variance. Every head of a layer spends the same number of bits per vector, so that all codes stand at computable places.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fibkv.contract import Contract, MarkedContract
from fibkv.errors import ContractError

PAIR_LEVELS = (0, 2, 4, 6, 8)
"""Bits that a pair of coordinates can have: codebooks of 1, 4, 16, 64 and 256 codewords."""

KLT_BITS: Mapping[str, float] = {"klt2": 2, "klt2.5": 2.5, "klt3": 3, "klt4": 4}
"""Payload bits per coordinate by name; the parameters behind a name are those of a layer of a calibration."""

KLT_RIVALS: Mapping[str, str] = {"key2": "klt2", "key3": "klt3"}
"""By keys of a recipe the klt codes that take fewer bits, having no mean per page."""

KLT_RUNGS: tuple[tuple[str, str], ...] = (("klt2", "fib2"), ("klt2.5", "fib2"), ("klt3", "value3"))
"""Codecs of keys and values that calibrations measure beside the recipes. (At 4 bits klt codes are worse.)"""


class HeadAllocation(Contract):
    """Of one KV head, pair by pair.

    Attributes:
        bits: of a pair, from the first pair on; they do not rise.
        half_octaves: by how many half octaves the variance of a pair is below that of the first: what an encoder weighs
            the errors of a pair with is 2 ** (-half_octaves / 2).
    """

    bits: tuple[Literal[0, 2, 4, 6, 8], ...]
    half_octaves: tuple[Annotated[int, Field(ge=0, le=255)], ...]


class KltParameters(MarkedContract):
    """Pairs of coordinates, each in the codebook of its bits, and one 8-bit log norm per vector.

    ``scale_search`` is that of `fibkv.parameters.FibParameters`: the encoder's alone.

    Raises:
        ContractError: on construction, for allocations that do not fit ``head_dim`` or one another.
    """

    schema_version: Literal["fibkv_klt_parameters_v1"] = "fibkv_klt_parameters_v1"
    codec: Literal["klt"] = "klt"
    head_dim: Annotated[int, Field(ge=2, le=4096, multiple_of=2)]
    heads: Annotated[tuple[HeadAllocation, ...], Field(min_length=1)]
    scale_search: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        pairs, total = self.head_dim // 2, sum(self.heads[0].bits)
        for index, head in enumerate(self.heads):
            where = f"KltParameters.heads[{index}]"
            if (len(head.bits), len(head.half_octaves)) != (pairs, pairs):
                raise ContractError(where, f"{pairs} pairs", (len(head.bits), len(head.half_octaves)))
            if any(before < after for before, after in pairwise(head.bits)):
                raise ContractError(f"{where}.bits", "numbers that do not rise", head.bits)
            if sum(head.bits) != total or not total:
                raise ContractError(f"{where}.bits", f"{total or 'some'} bits, as of every head", sum(head.bits))
        return self

    @property
    def block_dim(self) -> int:
        """Coordinates coded together."""
        return 2

    @property
    def vector_bits(self) -> int:
        """Bits of a vector, without its norm."""
        return sum(self.heads[0].bits)

    def of_heads(self, start: int, stop: int) -> KltParameters:
        """The parameters of heads ``start:stop``."""
        return self if stop - start == len(self.heads) else self.model_copy(update={"heads": self.heads[start:stop]})
