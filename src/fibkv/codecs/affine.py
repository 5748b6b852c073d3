"""affine: whole numbers of 2, 3 or 4 bits between the ends of a group, KIVI's code (arXiv 2402.02750).

Per token a group is some channels of one vector, per channel it is the tokens of one segment: a page of 32 tokens is
KIVI's group of 32. bits + 32 / group bits per element: both numbers of a grid are float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fibkv.codecs.base import Codec, Field, require
from fibkv.codes import AffineChannelCodes, AffineCodes, Codes
from fibkv.errors import PageError
from fibkv.packing import packed_nbytes, stray_bits
from fibkv.parameters import AffineParameters
from fibkv.tables import AffineTables


class AffineCodec(Codec):
    """A code of its own on each axis; the others scale channels first (`fibkv.codecs.channel`)."""

    tables: AffineTables

    def __init__(
        self, parameters: AffineParameters, axis: Literal["raw", "per_token", "per_channel"] = "per_token"
    ) -> None:
        self.parameters = parameters
        self.tables = AffineTables(
            head_dim=parameters.head_dim,
            bits=parameters.bits,
            group=parameters.group,
            per_channel=axis == "per_channel",
        )
        self.codebook_digest = self.rotation_digest = "none:affine"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.parameters, "per_channel" if self.tables.per_channel else "per_token")

    def layout(self, tokens: int) -> tuple[Field, ...]:
        """``grid [d or T, groups, 2]`` and ``values [T, bytes]``."""
        grid = (self.head_dim, 2) if self.tables.per_channel else (tokens, self.tables.groups, 2)
        nbytes = packed_nbytes(self.head_dim, self.tables.bits)
        return Field("grid", torch.float16, grid), Field("values", torch.uint8, (tokens, nbytes))

    def assemble(self, tensors: dict[str, Tensor]) -> Codes:
        """AffineCodes, of the axis."""
        return AffineChannelCodes(**tensors) if self.tables.per_channel else AffineCodes(**tensors)

    def check_fields(self, fields: Mapping[str, Tensor]) -> None:
        """Grids are finite, steps not negative, filling bits zero."""
        require(torch.isfinite(fields["grid"]), "grid", "finite numbers")
        require(~torch.signbit(fields["grid"][..., 1]), "grid", "steps >= 0")
        if stray_bits(fields["values"], self.head_dim, self.tables.bits):
            raise PageError("codes field 'values': expected zero bits behind the last number of a vector")
