"""What was measured of key spaces and klt codes, and the one rule that chooses by it.

A cache with a calibration must not be worse than one without. So the recipe as it is, *plain*, is what stands unless
something measured a mean KL that is lower by `LEAST_GAIN`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fibkv.allocation import KLT_BITS, KLT_RIVALS
from fibkv.contract import Contract

SpaceKind = Literal["plain", "mean", "balanced", "klt"]

# From one window of 1024 tokens to another the ratio of two caches' KL varies by 2 to 4 %, so that of four windows by 1
# to 2 %. A mean that won by .6 % on the text of a calibration lost 1.4 % on other text (docs/QUALITY.md).
LEAST_GAIN = 0.03


class SpaceTrial(Contract):
    """Mean KL with all keys and values of one codec, the keys in one kind of space."""

    profile: str
    space: SpaceKind
    kl: float


def best_space(trials: Sequence[SpaceTrial], profile: str) -> SpaceKind:
    """The kind of space for keys of a codec; ``plain`` for one that was not tried.

    Klt codes are made for a space of their own.
    """
    return "klt" if profile in KLT_BITS else _best(trials, profile)[0]


def best_keys(trials: Sequence[SpaceTrial], profile: str) -> str:
    """The keys of a recipe, or the klt codes that may stand for them, if these measured better than the best space."""
    rival = KLT_RIVALS.get(profile)
    kl = _best(trials, profile)[1]
    is_better = any(one.kl < (1 - LEAST_GAIN) * kl for one in trials if one.profile == rival)
    return rival if rival is not None and is_better else profile


def _best(trials: Sequence[SpaceTrial], profile: str) -> tuple[SpaceKind, float]:
    """The best kind of space of a codec, and its KL; 0 where there is nothing to compare with."""
    kls = {one.space: one.kl for one in trials if one.profile == profile}
    if "plain" not in kls:
        return "plain", 0.0
    kind = min(kls, key=lambda kind: kls[kind])
    return (kind, kls[kind]) if kls[kind] < (1 - LEAST_GAIN) * kls["plain"] else ("plain", kls["plain"])
