"""int8 and fp8 (e4m3): 8-bit numbers with one scale per token and head, and no rotation.

Scales are bfloat16, rounded up so that no value is clipped. 8 + 16/d bits per element.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fibkv.codecs.base import Codec, Field, require
from fibkv.codes import Codes, ScaledCodes
from fibkv.parameters import Fp8Parameters, Int8Parameters
from fibkv.tables import ScaledTables


class _ScaledCodec(Codec):
    tables: ScaledTables

    def layout(self, tokens: int) -> tuple[Field, ...]:
        """``scales [T]`` and ``values [T, d]``."""
        return (
            Field("scales", torch.bfloat16, (tokens,)),
            Field("values", self.tables.dtype, (tokens, self.head_dim)),
        )

    def assemble(self, tensors: dict[str, Tensor]) -> Codes:
        """ScaledCodes."""
        return ScaledCodes(**tensors)

    def check_fields(self, fields: Mapping[str, Tensor]) -> None:
        """Scales are finite and not negative, values inside the symmetric range."""
        scales = fields["scales"]
        require(torch.isfinite(scales) & ~torch.signbit(scales), "scales", "finite numbers >= 0")
        # Compared as float32: NaN, the one code of e4m3 outside its range, fails the comparison too.
        limit = self.tables.limit
        require(fields["values"].to(torch.float32).abs() <= limit, "values", f"numbers in -{limit:g}..{limit:g}")


class Int8Codec(_ScaledCodec):
    """round(x / scale) in -127..127, scale = max |x| / 127 of each vector."""

    def __init__(self, parameters: Int8Parameters) -> None:
        self.parameters = parameters
        self.tables = ScaledTables(dtype=torch.int8, limit=127.0, head_dim=parameters.head_dim)
        self.codebook_digest = self.rotation_digest = "none:int8"


class Fp8Codec(_ScaledCodec):
    """x / scale in float8 e4m3, scale = max |x| / 448 of each vector."""

    def __init__(self, parameters: Fp8Parameters) -> None:
        self.parameters = parameters
        self.tables = ScaledTables(dtype=torch.float8_e4m3fn, limit=448.0, head_dim=parameters.head_dim)
        self.codebook_digest = self.rotation_digest = "none:fp8"
