import sys
import threading
from collections.abc import Iterator
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fibkv.errors import ContractError
from fibkv.pressure import LEVELS, MEMORY_FACTORS, Level, PressureConfig, PressureController, PressureState


def feed(controller: PressureController, *samples: float) -> Level:
    level = controller.level
    for sample in samples:
        level = controller.observe(sample)
    return level


def test_levels_ordinals_and_factors() -> None:
    assert LEVELS == get_args(Level) == ("fp16", "q8", "fp8", "q4")
    assert [MEMORY_FACTORS[level] for level in LEVELS] == [1.0, 0.5, 0.5, 0.25]


def test_profiles() -> None:
    assert PressureConfig().model_dump() == {
        "q8_threshold": 0.80,
        "q4_threshold": 0.95,
        "hysteresis": 0.05,
        "ewma_alpha": 0.20,
        "min_level": "fp16",
        "max_level": "q4",
        "eight_bit": "q8",
    }
    assert PressureConfig.fp16_only() == PressureConfig(min_level="fp16", max_level="fp16")
    assert PressureConfig.aggressive() == PressureConfig(
        q8_threshold=0.50, q4_threshold=0.80, hysteresis=0.05, ewma_alpha=0.30, min_level="q8", max_level="q4"
    )


def test_low_pressure_stays_fp16() -> None:
    controller = PressureController()
    assert feed(controller, *[0.10] * 50) == "fp16"
    assert controller.upgrades == controller.downgrades == 0


def test_climb_hold_and_fall() -> None:
    controller = PressureController()
    assert feed(controller, *[0.85] * 40) == "q8"
    assert feed(controller, *[0.98] * 40) == "q4"
    assert controller.upgrades >= 2
    assert feed(controller, *[0.93] * 40) == "q4"
    assert controller.downgrades == 0
    assert feed(controller, *[0.05] * 200) == "fp16"
    assert controller.downgrades >= 1


def test_noise_around_a_threshold_does_not_hunt() -> None:
    controller = PressureController()
    feed(controller, *[0.85] * 40)
    feed(controller, *[0.78, 0.82] * 20)
    assert controller.upgrades + controller.downgrades < 10


def test_fp16_only_never_moves() -> None:
    controller = PressureController(PressureConfig.fp16_only())
    assert feed(controller, *[1.0] * 200) == "fp16"
    assert (controller.upgrades, controller.downgrades, controller.samples) == (0, 0, 200)


def test_aggressive() -> None:
    controller = PressureController(PressureConfig.aggressive())
    assert controller.level == "q8"
    assert feed(controller, *[0.95] * 30) == "q4"


@pytest.mark.parametrize(("sample", "clamped"), [(-1.0, 0.0), (2.0, 1.0), (float("inf"), 1.0), (-float("inf"), 0.0)])
def test_samples_are_clamped(sample: float, clamped: float) -> None:
    controller = PressureController()
    controller.observe(sample)
    assert controller.pressure == clamped


def test_nan_is_refused_and_changes_nothing() -> None:
    controller = PressureController()
    feed(controller, 0.85)
    before = controller.snapshot()
    with pytest.raises(ContractError, match=r"^PressureController\.observe\.occupancy: expected a number, got nan$"):
        controller.observe(float("nan"))
    assert controller.snapshot() == before


def test_first_sample_is_taken_whole_and_later_ones_smoothed() -> None:
    controller = PressureController()
    controller.observe(0.5)
    assert controller.pressure == 0.5
    controller.observe(1.0)
    assert controller.pressure == 0.2 * 1.0 + (1.0 - 0.2) * 0.5


def test_arithmetic_is_float64() -> None:
    controller = PressureController()
    feed(controller, 0.1, np.float32(0.1))
    assert controller.pressure == 0.2 * float(np.float32(0.1)) + (1.0 - 0.2) * 0.1
    assert type(controller.pressure) is float


def test_pressure_on_a_bound_belongs_to_the_more_compact_level() -> None:
    # All exact in binary; alpha 1 makes the pressure the sample.
    config = PressureConfig(q8_threshold=0.5, q4_threshold=0.875, hysteresis=0.25, ewma_alpha=1.0)
    controller = PressureController(config)
    assert [controller.observe(sample) for sample in (0.5, 0.25, 0.875, 0.625)] == ["q8", "q8", "q4", "q4"]
    assert controller.observe(0.6249) == "q8"
    assert controller.observe(0.2499) == "fp16"


def test_reset_and_snapshot() -> None:
    controller = PressureController(PressureConfig.aggressive())
    feed(controller, *[0.95] * 30)
    assert controller.snapshot() == PressureState(
        level="q4", pressure=controller.pressure, samples=30, upgrades=1, downgrades=0
    )
    controller.reset()
    assert controller.snapshot() == PressureState(level="q8", pressure=0.0, samples=0, upgrades=0, downgrades=0)
    # A reset controller takes its first sample whole again.
    controller.observe(0.25)
    assert controller.pressure == 0.25


@pytest.mark.parametrize("field", ["q8_threshold", "q4_threshold", "hysteresis", "ewma_alpha"])
@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan")])
def test_fractions_outside_the_unit_interval_are_refused(field: str, value: float) -> None:
    with pytest.raises(ContractError, match=rf"^PressureConfig\.{field}: expected (less|greater) than or equal|finite"):
        PressureConfig().model_copy(update={field: value})


def test_contradictions_are_refused() -> None:
    with pytest.raises(ContractError, match=r"q4_threshold: expected at least q8_threshold \(0\.8\), got 0\.7"):
        PressureConfig(q4_threshold=0.7)
    with pytest.raises(ContractError, match=r"min_level: expected no level above max_level \(q8\), got 'q4'"):
        PressureConfig(min_level="q4", max_level="q8")
    with pytest.raises(ContractError, match=r"max_level: expected 'fp16', 'q8', 'fp8' or 'q4', got 'q2'"):
        PressureConfig(max_level="q2")  # type: ignore[arg-type]


def test_fp8_is_reached_as_the_maximum() -> None:
    controller = PressureController(PressureConfig(max_level="fp8"))
    assert feed(controller, *[0.85] * 40) == "q8"
    assert feed(controller, *[1.0] * 40) == "fp8"


def test_fp8_as_the_minimum_replaces_fp16_and_q8() -> None:
    controller = PressureController(PressureConfig(min_level="fp8"))
    assert controller.level == "fp8"
    assert feed(controller, *[0.85] * 40) == "fp8"
    assert feed(controller, *[1.0] * 40) == "q4"
    assert feed(controller, *[0.0] * 40) == "fp8"


def test_fp8_as_the_eight_bit_rung() -> None:
    controller = PressureController(PressureConfig(eight_bit="fp8"))
    assert feed(controller, *[0.85] * 40) == "fp8"
    # Held by the hysteresis below the threshold, as q8 would be.
    assert feed(controller, *[0.76] * 40) == "fp8"
    assert feed(controller, *[0.98] * 40) == "q4"
    assert feed(controller, *[0.85] * 40) == "fp8"
    assert feed(controller, *[0.05] * 40) == "fp16"
    assert PressureController(PressureConfig.aggressive(eight_bit="fp8")).level == "fp8"


@pytest.mark.parametrize("bounds", [{"min_level": "q8"}, {"max_level": "q8"}])
def test_q8_is_no_bound_of_a_ladder_without_it(bounds: dict[str, Level]) -> None:
    with pytest.raises(ContractError, match=r"_level: expected another level than q8 with eight_bit fp8, got 'q8'"):
        PressureConfig(eight_bit="fp8", **bounds)


def spec_step(config: PressureConfig, level: str, pressure: float) -> str:
    """Steps 3 to 5 of the contract, word for word, for the eight-bit rung q8."""
    if pressure >= config.q4_threshold:
        raw = "q4"
    elif pressure >= config.q8_threshold:
        raw = "q8"
    else:
        raw = "fp16"
    if level == "q4" and raw in ("q8", "fp16"):
        after = raw if pressure < config.q4_threshold - config.hysteresis else "q4"
    elif level == "q8" and raw == "fp16":
        after = raw if pressure < config.q8_threshold - config.hysteresis else "q8"
    else:
        after = raw
    order = ["fp16", "q8", "fp8", "q4"]
    return order[max(order.index(config.min_level), min(order.index(config.max_level), order.index(after)))]


UNIT = st.floats(0, 1)


@given(
    thresholds=st.tuples(UNIT, UNIT).map(sorted),
    hysteresis=UNIT,
    alpha=UNIT,
    bounds=st.lists(st.integers(0, 3), min_size=2, max_size=2).map(sorted),
    samples=st.lists(UNIT, max_size=30),
)
def test_every_step_is_the_contracts(
    thresholds: list[float], hysteresis: float, alpha: float, bounds: list[int], samples: list[float]
) -> None:
    config = PressureConfig(
        q8_threshold=thresholds[0],
        q4_threshold=thresholds[1],
        hysteresis=hysteresis,
        ewma_alpha=alpha,
        min_level=LEVELS[bounds[0]],
        max_level=LEVELS[bounds[1]],
    )
    controller = PressureController(config)
    level, pressure, moves = config.min_level, 0.0, [0, 0]
    for count, sample in enumerate(samples):
        pressure = sample if count == 0 else alpha * sample + (1.0 - alpha) * pressure
        after = spec_step(config, level, pressure)
        change = LEVELS.index(after) - LEVELS.index(level)
        moves = [moves[0] + (change > 0), moves[1] + (change < 0)]
        level = after
        assert controller.observe(sample) == level
    assert controller.snapshot() == PressureState(
        level=level, pressure=pressure, samples=len(samples), upgrades=moves[0], downgrades=moves[1]
    )


@pytest.fixture
def eager_switching() -> Iterator[None]:
    """Threads that yield to each other all the time, so that a missing lock shows."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-7)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("eager_switching")
@pytest.mark.parametrize("calls", [100, 3000])
def test_many_threads_lose_no_sample_and_no_move(calls: int) -> None:
    # Every sample moves the level between fp16 and q4, where a lost or doubled move shows in the balance.
    controller = PressureController(PressureConfig(ewma_alpha=1.0, hysteresis=0.0))
    start = threading.Barrier(8)

    def work(thread: int) -> None:
        start.wait()
        for call in range(calls):
            controller.observe(float((thread + call) % 2))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = controller.snapshot()
    assert state.samples == 8 * calls
    assert state.upgrades - state.downgrades == (state.level == "q4")
