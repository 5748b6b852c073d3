"""The pressure controller: from the cache's occupancy to its precision level.

Levels from least to most compact are fp16, q8, fp8, q4. The ladder that the controller climbs has three rungs,
fp16, an eight-bit one (:attr:`PressureConfig.eight_bit`) and q4; the bounds may name any level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from threading import Lock
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from fibkv.contract import Contract, Total
from fibkv.errors import ContractError

Level = Literal["fp16", "q8", "fp8", "q4"]
EightBit = Literal["q8", "fp8"]

LEVELS: tuple[Level, ...] = get_args(Level)
"""All levels; the index of a level is its ordinal."""

MEMORY_FACTORS: Mapping[Level, float] = {"fp16": 1.0, "q8": 0.5, "fp8": 0.5, "q4": 0.25}
"""Nominal memory of each level relative to fp16."""

_FP16, _Q4 = LEVELS.index("fp16"), LEVELS.index("q4")

_Unit = Annotated[float, Field(ge=0, le=1)]


class PressureConfig(Contract):
    """Thresholds, smoothing and bounds of the controller.

    With ``eight_bit`` "fp8" the level q8 is never chosen, so it is refused as a bound: clamping to it
    would bring in by the back door the rung that the setting rules out. With "q8" a bound may be
    fp8: as the maximum it is reached where q4 was called for, as the minimum it replaces q8.
    """

    q8_threshold: _Unit = 0.80
    q4_threshold: _Unit = 0.95
    hysteresis: _Unit = 0.05
    ewma_alpha: _Unit = 0.20
    min_level: Level = "fp16"
    max_level: Level = "q4"
    eight_bit: EightBit = "q8"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.q4_threshold < self.q8_threshold:
            expected = f"at least q8_threshold ({self.q8_threshold})"
            raise ContractError("PressureConfig.q4_threshold", expected, self.q4_threshold)
        if LEVELS.index(self.min_level) > LEVELS.index(self.max_level):
            expected = f"no level above max_level ({self.max_level})"
            raise ContractError("PressureConfig.min_level", expected, self.min_level)
        if self.eight_bit == "fp8":
            for name in ("min_level", "max_level"):
                if getattr(self, name) == "q8":
                    raise ContractError(f"PressureConfig.{name}", "another level than q8 with eight_bit fp8", "q8")
        return self

    @classmethod
    def fp16_only(cls) -> PressureConfig:
        """Never leave fp16."""
        return cls(min_level="fp16", max_level="fp16")

    @classmethod
    def aggressive(cls, eight_bit: EightBit = "q8") -> PressureConfig:
        """Start at eight bits and go to four early."""
        return cls(
            q8_threshold=0.50,
            q4_threshold=0.80,
            hysteresis=0.05,
            ewma_alpha=0.30,
            min_level=eight_bit,
            max_level="q4",
            eight_bit=eight_bit,
        )


class PressureState(Contract):
    """What a controller knows at one moment."""

    level: Level
    pressure: Annotated[float, Field(ge=0, le=1)]
    samples: Total
    upgrades: Total
    downgrades: Total


class PressureController:
    """Smooths observed occupancy and moves between levels with hysteresis. Safe to use from many threads."""

    def __init__(self, config: PressureConfig | None = None) -> None:
        self.config = config or PressureConfig()
        self._q8_threshold = self.config.q8_threshold
        self._q4_threshold = self.config.q4_threshold
        self._q8_floor = self.config.q8_threshold - self.config.hysteresis
        self._q4_floor = self.config.q4_threshold - self.config.hysteresis
        self._alpha = self.config.ewma_alpha
        self._eight_bit = LEVELS.index(self.config.eight_bit)
        self._min = LEVELS.index(self.config.min_level)
        self._max = LEVELS.index(self.config.max_level)
        self._lock = Lock()
        self.reset()

    def reset(self) -> None:
        """Back to the minimum level, with no samples seen."""
        with self._lock:
            self._ordinal = self._min
            self._pressure = 0.0
            self._samples = 0
            self._upgrades = 0
            self._downgrades = 0

    def observe(self, occupancy: float) -> Level:
        """Takes one sample of occupancy and returns the level that it leads to.

        Args:
            occupancy: bytes held over bytes budgeted; clamped to [0, 1].

        Raises:
            ContractError: the occupancy is not a number; nothing has changed then.
        """
        if math.isnan(occupancy):
            raise ContractError("PressureController.observe.occupancy", "a number", occupancy)
        # Comparisons, here and below: calls of min and max would take as long as all the rest.
        sample = 0.0 if occupancy <= 0.0 else 1.0 if occupancy >= 1.0 else float(occupancy)
        with self._lock:
            if self._samples == 0:
                self._pressure = sample
            else:
                self._pressure = self._alpha * sample + (1.0 - self._alpha) * self._pressure
            self._samples += 1
            before, after = self._ordinal, self._next_ordinal()
            if after != before:
                after = self._min if after < self._min else self._max if after > self._max else after
                self._ordinal = after
                if after > before:
                    self._upgrades += 1
                elif after < before:
                    self._downgrades += 1
        return LEVELS[after]

    @property
    def level(self) -> Level:
        """The current level."""
        return LEVELS[self._ordinal]

    @property
    def pressure(self) -> float:
        """Smoothed occupancy in [0, 1]."""
        return self._pressure

    @property
    def samples(self) -> int:
        """Samples seen since the last reset."""
        return self._samples

    @property
    def upgrades(self) -> int:
        """Moves to a more compact level since the last reset."""
        return self._upgrades

    @property
    def downgrades(self) -> int:
        """Moves to a less compact level since the last reset."""
        return self._downgrades

    def snapshot(self) -> PressureState:
        """All of the state, as of one moment."""
        with self._lock:
            return PressureState(
                level=LEVELS[self._ordinal],
                pressure=self._pressure,
                samples=self._samples,
                upgrades=self._upgrades,
                downgrades=self._downgrades,
            )

    def _next_ordinal(self) -> int:
        """The level that pressure and hysteresis call for, before the bounds; needs the lock."""
        pressure, current = self._pressure, self._ordinal
        if pressure >= self._q4_threshold or (current == _Q4 and pressure >= self._q4_floor):
            return _Q4
        if pressure >= self._q8_threshold or (current == self._eight_bit and pressure >= self._q8_floor):
            return self._eight_bit
        return _FP16
