"""raw: vectors as they are, in float16, bfloat16 or float32."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fibkv.codecs.base import Codec, Field, require
from fibkv.codes import Codes, RawCodes
from fibkv.parameters import RawParameters
from fibkv.tables import RawTables

TORCH_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


class RawCodec(Codec):
    """Stores vectors unchanged: what protected regions, tails and fallbacks use."""

    tables: RawTables

    def __init__(self, parameters: RawParameters) -> None:
        self.parameters = parameters
        self.tables = RawTables(dtype=TORCH_DTYPES[parameters.dtype], head_dim=parameters.head_dim)
        self.codebook_digest = self.rotation_digest = "none:raw"

    def layout(self, tokens: int) -> tuple[Field, ...]:
        """``values [T, d]``."""
        return (Field("values", self.tables.dtype, (tokens, self.head_dim)),)

    def assemble(self, tensors: dict[str, Tensor]) -> Codes:
        """RawCodes."""
        return RawCodes(**tensors)

    def check_fields(self, fields: Mapping[str, Tensor]) -> None:
        """Values must be finite."""
        require(torch.isfinite(fields["values"]), "values", "finite numbers")
