"""fib: FibQuant (arXiv 2605.11478). Normalize, rotate, cut into blocks, nearest codeword of one shared codebook.

k = 1 is the scalar case (TurboQuant, arXiv 2504.19874). ceil(log2 N)/k + norm bits/d bits per element, and with
8-bit log norms 32 bits per group for the range of its norms. Centered groups have a mean of 8 (1 + d) bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from fibkv import codebook
from fibkv.codecs.base import Codec, Field, require
from fibkv.codes import Codes, FibCodes
from fibkv.decision_table import decision_table
from fibkv.errors import ContractError, PageError
from fibkv.means import LIMIT, MAX_EXPONENT, MIN_EXPONENT
from fibkv.packing import stray_bits, unpack
from fibkv.parameters import FibParameters
from fibkv.rotation import rotation
from fibkv.tables import FibTables

# Of the way in which codebooks are trained: a new one gives old parameters another meaning.
CODEBOOK_VERSION = 1
# Of a scale search: a geometric grid from 0.86 to 1.16. At 4 bits nine factors from 0.8 to 1.25 win another 1.5 % of
# error at twice the cost, three lose 2 %.
SCALES = tuple(1.16 ** (step / 2) for step in range(-2, 3))


class FibCodec(Codec):
    """FibQuant at any (k, N): the codebook is shipped, cached on disk, or built on first use."""

    tables: FibTables

    def __init__(self, parameters: FibParameters) -> None:
        self.parameters = parameters
        book = codebook.load(parameters.block_dim, parameters.codebook_size)
        _check_book(parameters, book.report)
        turn = rotation(parameters.rotation, parameters.head_dim, parameters.rotation_seed)
        codewords = book.codewords / sqrt(parameters.head_dim)
        self.tables = FibTables(
            codewords=codewords,
            rotation=turn,
            head_dim=parameters.head_dim,
            bits=parameters.wire_bits,
            norm_format=parameters.norm_format,
            gain_corrected=parameters.gain_corrected,
            scales=SCALES if parameters.scale_search else (1.0,),
            decisions=decision_table(codewords) if parameters.codeword_search == "table" else None,
            centered=parameters.centered,
        )
        self.codebook_digest = book.digest
        self.rotation_digest = turn.digest

    def layout(self, tokens: int) -> tuple[Field, ...]:
        """``mean [1 + d or 0]``, ``norm_range [2 or 0]``, ``norms [T]`` and ``indices [T, bytes]``."""
        log8 = self.tables.norm_format == "log8"
        return (
            Field("mean", torch.int8, (1 + self.head_dim if self.tables.centered else 0,)),
            Field("norm_range", torch.float16, (2 if log8 else 0,)),
            Field("norms", torch.uint8 if log8 else torch.float16, (tokens,)),
            Field("indices", torch.uint8, (tokens, self.tables.code_nbytes)),
        )

    def assemble(self, tensors: dict[str, Tensor]) -> Codes:
        """FibCodes."""
        return FibCodes(**tensors)

    @property
    def free_fields(self) -> frozenset[str]:
        """8-bit norms; indices, where every one is of a codeword and they fill their bytes."""
        norms = {"norms"} if self.tables.norm_format == "log8" else set()
        whole = self.tables.codewords.shape[0] >= 1 << self.tables.bits
        fill = whole and self.tables.num_blocks * self.tables.bits % 8 == 0
        return frozenset(norms | {"indices"} if fill else norms)

    def check_fields(self, fields: Mapping[str, Tensor]) -> None:
        """Indices are inside the codebook, filling bits zero, norms finite and not negative, means within float32."""
        # A few numbers per page, on the way of every page that is loaded: numpy takes a fifth of torch's time for them.
        if self.tables.centered:
            means = fields["mean"].cpu().numpy()
            exponent, mean = means[..., 0], means[..., 1:]
            expected = f"a power of two in {MIN_EXPONENT}..{MAX_EXPONENT}"
            require((exponent >= MIN_EXPONENT) & (exponent <= MAX_EXPONENT), "mean", expected)
            require(mean >= -LIMIT, "mean", f"numbers in -{LIMIT}..{LIMIT}")
        if "indices" in fields:
            self._check_indices(fields["indices"])
        if self.tables.norm_format == "f16":
            norms = fields["norms"].cpu().numpy()
            require(np.isfinite(norms) & ~np.signbit(norms), "norms", "finite numbers >= 0")
            return
        check_norm_range(fields["norm_range"])

    def _check_indices(self, packed: Tensor) -> None:
        """Refuses indices outside the codebook, and bits behind the last one."""
        size, count, bits = self.tables.codewords.shape[0], self.tables.num_blocks, self.tables.bits
        if size < 1 << bits:  # else there are no others
            require(unpack(packed, count, bits) < size, "indices", f"codes inside the codebook of {size} words")
        if stray_bits(packed, count, bits):
            raise PageError("codes field 'indices': expected zero bits behind the last index of a vector")


def check_norm_range(norm_range: Tensor) -> None:
    """Refuses ranges of 8-bit log norms ``[..., 2]`` that no encoder makes.

    Raises:
        PageError: with the field and the rule.
    """
    # A few numbers per page, on the way of every page that is loaded: numpy takes a fifth of torch's time for them.
    ranges = norm_range.cpu().numpy().astype(np.float32)
    low, step = ranges[..., 0], ranges[..., 1]
    with np.errstate(invalid="ignore"):  # infinite ones have no sum
        highest = low + 254 * step
    # 2**128 is the first norm beyond float32.
    require(np.isfinite(low) & (highest < 129), "norm_range", "norms within float32")
    require(step > 0, "norm_range", "a positive step")


def _check_book(parameters: FibParameters, report: codebook.CodebookReport) -> None:
    """Refuses parameters that speak of another codebook than the one of their (k, N)."""
    if parameters.training != report.training:
        raise ContractError("FibParameters.training", f"{report.training!r} of the codebook", parameters.training)
    if (parameters.codebook_seed, parameters.codebook_version) != (report.seed, CODEBOOK_VERSION):
        expected = f"seed {report.seed} and version {CODEBOOK_VERSION} of the codebook"
        raise ContractError(
            "FibParameters.codebook_seed, codebook_version",
            expected,
            (parameters.codebook_seed, parameters.codebook_version),
        )


def unit_distortion(parameters: FibParameters, *, vectors: int, seed: int = 0) -> float:
    """E|u - û|² of a codec on random unit vectors, which no codebook was trained on.

    Args:
        parameters: of the codec.
        vectors: how many.
        seed: of the vectors.
    """
    codec = FibCodec(parameters)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(vectors, parameters.head_dim, generator=generator), dim=-1)
    return float((rows - codec.decode(codec.encode(rows))).double().square().sum(-1).mean())
