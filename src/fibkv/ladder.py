"""The ladder: which codecs each precision level stands for."""

from __future__ import annotations

from typing import Literal, get_args

from fibkv.contract import Contract
from fibkv.errors import ContractError
from fibkv.parameters import CodecParameters
from fibkv.pressure import PressureConfig

Choice = str | CodecParameters
Rung = Literal["fp16", "q8", "fp8", "q4", "q2"]
RUNGS: tuple[Rung, ...] = get_args(Rung)
"""All rungs from the least to the most compact: the controller's levels, and one below them."""


class Ladder(Contract):
    """Codecs of keys and values at each level.

    Attributes:
        fp16: raw, in the 16-bit dtype of the model (float16 for a float32 model, unless ``raw_dtype`` says else).
        q8: eight bits, integer.
        fp8: eight bits, e4m3.
        q4: four bits, by the recipe behind ``bits=4``.
        q2: below the controller's levels: what old pages become when all of them are at q4 and do not fit. None = the
            ladder ends at q4.
    """

    fp16: tuple[Choice, Choice] = ("raw", "raw")
    q8: tuple[Choice, Choice] = ("int8", "int8")
    fp8: tuple[Choice, Choice] = ("fp8", "fp8")
    q4: tuple[Choice, Choice] = ("key4", "value4")
    q2: tuple[Choice, Choice] | None = None

    def rungs(self, config: PressureConfig) -> tuple[Rung, ...]:
        """The rungs that a controller with these bounds, and the governor below it, may use, in order."""
        first, last = RUNGS.index(config.min_level), RUNGS.index(config.max_level)
        levels = {"fp16", config.eight_bit, "q4", config.min_level, config.max_level}
        used = [rung for rung in RUNGS[first : last + 1] if rung in levels]
        return (*used, "q2") if self.q2 is not None and config.max_level == "q4" else tuple(used)

    def choices(self, rung: Rung) -> tuple[Choice, Choice]:
        """Codecs of the keys and the values at a rung.

        Raises:
            ContractError: the ladder does not have the rung.
        """
        found: tuple[Choice, Choice] | None = getattr(self, rung)
        if found is None:
            raise ContractError(f"Ladder.{rung}", "a pair of codecs", None)
        return found
