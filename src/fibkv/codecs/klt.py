"""klt: pairs of coordinates with a static number of bits each, for keys in the space of a Karhunen-Loeve transform.

There a few coordinates carry most of what queries see of a key. Each pair has the k = 2 codebook of its bits, of 1, 4,
16, 64 or 256 codewords, and the vector one 8-bit log norm: bits per vector + 8 + 32 / T, in pages of T tokens. The
transform, and the pairs' scales, are the key space's; what stands here is the allocation of the layer's heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from fibkv import codebook
from fibkv.allocation import PAIR_LEVELS, KltParameters
from fibkv.codecs.base import Codec, Field, require
from fibkv.codecs.fib import SCALES, check_norm_range
from fibkv.codes import Codes, FibCodes
from fibkv.digest import digest
from fibkv.packing import packed_nbytes
from fibkv.tables import KltTables

BOOKS_DOMAIN = "fibkv_klt_codebooks_v1"


@lru_cache(maxsize=1)
def _codewords() -> tuple[Tensor, str]:
    """The codewords ``[341, 2]`` of all levels, from the fewest bits, and a digest over their codebooks."""
    # Of four codewords the best are two levels in both coordinates.
    scalar = codebook.load(1, 2)
    larger = [codebook.load(2, 1 << bits) for bits in PAIR_LEVELS[2:]]
    square = torch.tensor(list(product(scalar.codewords.flatten().tolist(), repeat=2)))
    codewords = torch.cat([torch.zeros(1, 2), square, *(book.codewords for book in larger)])
    return codewords.to(torch.float32), digest(BOOKS_DOMAIN, [scalar.digest, *(book.digest for book in larger)])


class KltCodec(Codec):
    """The code of the heads of one layer; codes are those of FibQuant, with indices of several widths."""

    tables: KltTables

    def __init__(self, parameters: KltParameters) -> None:
        self.parameters: KltParameters = parameters
        codewords, self.codebook_digest = _codewords()
        self.rotation_digest = "none:klt"
        falls = torch.tensor([head.half_octaves for head in parameters.heads], dtype=torch.float64)
        self.tables = KltTables(
            head_dim=parameters.head_dim,
            bits=torch.tensor([head.bits for head in parameters.heads], dtype=torch.uint8),
            weights=torch.exp2(-falls / 2).to(torch.float32),
            codewords=codewords,
            scales=SCALES if parameters.scale_search else (1.0,),
        )

    def of_heads(self, start: int, stop: int) -> Codec:
        """The codec of heads ``start:stop``, one object for the same ones."""
        return _of(self.parameters.of_heads(start, stop)) if stop - start < self.tables.heads else self

    def layout(self, tokens: int) -> tuple[Field, ...]:
        """``mean [0]``, ``norm_range [2]``, ``norms [T]`` and ``indices [T, bytes]``."""
        return (
            Field("mean", torch.int8, (0,)),
            Field("norm_range", torch.float16, (2,)),
            Field("norms", torch.uint8, (tokens,)),
            Field("indices", torch.uint8, (tokens, packed_nbytes(self.parameters.vector_bits, 1))),
        )

    def assemble(self, tensors: dict[str, Tensor]) -> Codes:
        """FibCodes."""
        return FibCodes(**tensors)

    @property
    def free_fields(self) -> frozenset[str]:
        """Norms; indices, where they fill their bytes: every one is of a codeword."""
        return frozenset({"norms", "indices"} if self.parameters.vector_bits % 8 == 0 else {"norms"})

    def check_fields(self, fields: Mapping[str, Tensor]) -> None:
        """Ranges of norms within float32, filling bits zero."""
        used = self.parameters.vector_bits % 8
        if used and "indices" in fields:
            require(fields["indices"][..., -1:] >> used == 0, "indices", "zero bits behind the last index")
        check_norm_range(fields["norm_range"])


@lru_cache(maxsize=256)
def _of(parameters: KltParameters) -> KltCodec:
    # Asked for while pages are sealed, perhaps in inference mode, whose tensors the process could not use elsewhere.
    with torch.inference_mode(False):
        return KltCodec(parameters)
