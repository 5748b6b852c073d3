"""trellis: a trellis code of 2, 3 or 4 bits per coordinate (`fibkv.trellis`). Codes are those of FibQuant, with blocks
of one coordinate: what differs is that a window of the indices names the level, and that an encoder searches for the
path of all of them together.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from torch import Tensor

from fibkv import trellis
from fibkv.codecs.fib import FibCodec
from fibkv.errors import ContractError
from fibkv.parameters import TrellisParameters
from fibkv.rotation import rotation
from fibkv.tables import FibTables
from fibkv.trellis import Trellis
from fibkv.word_rotation import fits, word_rotation

# Of the shipped codes: new levels give old parameters another meaning.
CODE_VERSION = 1
# Coordinates on both sides of the seam that are searched for what to have there; the fast search goes by bits, as a
# window spans five coordinates at 2 bits and three at 4. Multiples of four.
OVERLAP, FAST_OVERLAP = 64, {2: 12, 3: 12, 4: 8}
# Levels tried for each state.
WAYS = {"full": 3, "fast": 2}
# Of a scale search.
SCALES = (0.96, 1.0, 1.04)


@lru_cache(maxsize=32)
def _tables(bits: Literal[2, 3, 4], head_dim: int, overlap: int, ways: int) -> tuple[Trellis, Tensor]:
    """What codecs of one code and dimension share, centered or not: memory counts it once."""
    paths = Trellis.of(trellis.load(bits), head_dim, overlap, ways)
    return paths, paths.codewords


class TrellisCodec(FibCodec):
    """A trellis code: layout and checks are those of FibQuant, a code of one bit width and no codebook to build."""

    def __init__(self, parameters: TrellisParameters) -> None:
        self.parameters = parameters
        if parameters.code_version != CODE_VERSION:
            raise ContractError(
                "TrellisParameters.code_version", f"{CODE_VERSION} of the code", parameters.code_version
            )
        code = trellis.load(parameters.bits)
        search = parameters.path_search
        overlap = FAST_OVERLAP[parameters.bits] if search == "fast" else OVERLAP
        paths, codewords = _tables(parameters.bits, parameters.head_dim, overlap, WAYS[search])
        turn = rotation(parameters.rotation, parameters.head_dim, parameters.rotation_seed)
        self.tables = FibTables(
            codewords=codewords,
            rotation=turn,
            head_dim=parameters.head_dim,
            bits=parameters.bits,
            norm_format=parameters.norm_format,
            gain_corrected=parameters.gain_corrected,
            scales=SCALES if parameters.scale_search else (1.0,),
            centered=parameters.centered,
            trellis=paths,
            word_rotation=word_rotation(turn) if search == "fast" and fits(turn) else None,
        )
        self.codebook_digest = code.digest()
        self.rotation_digest = turn.digest
