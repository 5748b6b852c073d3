"""What a calibration may put in the place of a recipe."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fibkv.trials import LEAST_GAIN, SpaceTrial, best_keys, best_space

KLS = st.floats(1e-6, 10)


def trials(plain: float, mean: float, balanced: float, klt: float) -> list[SpaceTrial]:
    kinds = {"plain": plain, "mean": mean, "balanced": balanced}
    of_recipe = [SpaceTrial(profile="key3", space=kind, kl=kl) for kind, kl in kinds.items()]
    return [*of_recipe, SpaceTrial(profile="klt3", space="klt", kl=klt)]


@given(KLS, KLS, KLS, KLS)
def test_what_is_chosen_measured_better_than_the_recipe_or_is_the_recipe(
    plain: float, mean: float, balanced: float, klt: float
) -> None:
    measured = trials(plain, mean, balanced, klt)
    keys = best_keys(measured, "key3")
    kl = next(one.kl for one in measured if (one.profile, one.space) == (keys, best_space(measured, keys)))
    assert kl == plain or kl < (1 - LEAST_GAIN) * plain
    if min(mean, balanced, klt) < (1 - LEAST_GAIN) * plain:
        assert kl * (1 - LEAST_GAIN) <= min(plain, mean, balanced, klt), "nothing that matters is left lying"


def test_gains_within_what_texts_differ_by_are_none() -> None:
    assert best_space(trials(0.100, 0.098, 0.2, 0.098), "key3") == "plain"
    assert best_keys(trials(0.100, 0.098, 0.2, 0.098), "key3") == "key3"
    assert best_space(trials(0.100, 0.096, 0.095, 0.2), "key3") == "balanced"
    assert best_keys(trials(0.100, 0.096, 0.095, 0.094), "key3") == "key3", "against the recipe in its best space"
    assert best_keys(trials(0.100, 0.096, 0.095, 0.090), "key3") == "klt3"


def test_what_was_not_measured_stays_as_it_is() -> None:
    measured = trials(0.1, 0.01, 0.01, 0.01)
    assert (best_space(measured, "int8"), best_keys(measured, "int8")) == ("plain", "int8")
    assert best_keys(measured, "key2") == "key2"
    without_plain = [one for one in measured if one.space != "plain"]
    assert (best_space(without_plain, "key3"), best_keys(without_plain, "key3")) == ("plain", "key3")
    assert best_space((), "klt2") == "klt"
