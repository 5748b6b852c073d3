"""Quality budgets, enforced before a cache is used: each layer's codec against what a calibration measured of it; and
while it runs, against pages (`fibkv.sampling`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fibkv.calibration_file import Calibration
from fibkv.errors import ContractError
from fibkv.ladder import Choice
from fibkv.regions import QualityBudget
from fibkv.report import BudgetViolation
from fibkv.sampling import PageSampler
from fibkv.settings import CacheSettings
from fibkv.shape import Role

_ROLES: tuple[Role, Role] = ("key", "value")


def enforce_budget(
    settings: CacheSettings, budget: QualityBudget, calibration: Calibration | None
) -> tuple[CacheSettings, tuple[BudgetViolation, ...]]:
    """Settings in which every layer and role keeps the budget, and what had to be changed for it.

    Args:
        settings: of a cache.
        budget: every bound holds for each KV head of each layer, one role being coded and the other exact.
        calibration: of the model, which has measured the codecs in use on its texts.

    Returns:
        The settings, with ``raw`` for the roles of layers that broke a bound, and the violations.

    Raises:
        ContractError: nothing was measured of a codec in use; or a bound is broken and the budget's fallback is
            ``fail_closed``.
    """
    if not budget.has_any_metric:
        return settings, ()
    if calibration is None:
        raise ContractError("Cache.quality_budget", "a calibration beside it, which has measured the codecs", None)
    violations: list[BudgetViolation] = []
    profiles = dict(settings.layer_profiles)
    for layer in calibration.statistics:
        choices: list[Choice] = list(settings.choices(layer))
        for index, role in enumerate(_ROLES):
            broken = list(_violations(calibration, layer, role, settings.names(layer)[index], budget))
            if broken:
                choices[index] = "raw"
                violations += broken
        profiles[layer] = (choices[0], choices[1])
    if violations and budget.fallback_on_violation == "fail_closed":
        first = violations[0]
        where = f"layer {first.layer} head {first.head} {first.role} in {first.profile}"
        raise ContractError(f"QualityBudget.{first.bound}", f"at most {first.allowed:g} for {where}", first.measured)
    return replace(settings, layer_profiles=profiles), tuple(violations)


def sampled(
    settings: CacheSettings,
    budget: QualityBudget,
    calibration: Calibration | None,
    every: int | None,
    found: list[BudgetViolation],
) -> CacheSettings:
    """Settings whose layers measure the page of every so many when it is sealed; None = none of them.

    Args:
        settings: of a cache.
        budget: what is measured against.
        calibration: of the model, which knows its queries.
        every: 1 = all pages.
        found: where broken bounds are noted.

    Raises:
        ContractError: not a positive number, or nothing to measure against.
    """
    if every is None:
        return settings
    if type(every) is not int or every < 1:
        raise ContractError("Cache.sample_pages", "a positive number", every)
    if not budget.has_any_metric or calibration is None:
        raise ContractError("Cache.sample_pages", "a quality budget and a calibration beside it", every)
    samplers = {
        layer: PageSampler.of(layer, budget, every, statistics, found)
        for layer, statistics in calibration.statistics.items()
    }
    return replace(settings, samplers=samplers)


def _violations(
    calibration: Calibration, layer: int, role: Role, profile: str, budget: QualityBudget
) -> Iterator[BudgetViolation]:
    if profile == "raw":
        return
    measured = [
        one for one in calibration.info.sensitivities if (one.layer, one.role, one.profile) == (layer, role, profile)
    ]
    if not measured:
        known = sorted({one.profile for one in calibration.info.sensitivities})
        raise ContractError("Cache.quality_budget", f"codecs that were measured ({', '.join(known)})", profile)
    for head, errors in enumerate(measured[0].heads):
        for bound, value in errors.by_bound().items():
            allowed = getattr(budget, bound)
            if allowed is not None and value > allowed:
                yield BudgetViolation(
                    layer=layer, head=head, role=role, profile=profile, bound=bound, allowed=allowed, measured=value
                )
