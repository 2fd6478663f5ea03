"""The rivals: each rule's moves by hand, and what it is told of the readings."""

from collections.abc import Sequence

import pytest

from sglang_alloc_controller.budget_range import BudgetRange
from sglang_alloc_controller.samples import Histogram, Phase, Reading
from sglang_alloc_controller.settings import Settings, parse_settings
from sglang_alloc_controller.simulator.laws import Scrape
from sglang_alloc_controller.simulator.rival_signals import Observed, RivalLaw, StepRule
from sglang_alloc_controller.simulator.rivals import (
    Aimd,
    Gradient,
    PlainPi,
    SmoothedRatio,
    ThresholdSteps,
)

RANGES: dict[Phase, BudgetRange] = {"prefill": BudgetRange(0, 100), "decode": BudgetRange(10, 20)}
EDGES = (0.1, 0.2, 0.5, 1.0, 2.0, float("inf"))


def _at(worst_ratio: float, *medians_seconds: float) -> Observed:
    return Observed(worst_ratio, medians_seconds)


def _moves(rule: StepRule, position: float, ratios: Sequence[float]) -> list[float]:
    """What the rule wants for one ratio after the other, the position staying where it is."""
    return [rule.next(position, _at(ratio)) for ratio in ratios]


@pytest.mark.parametrize(
    ("ratio", "wanted"),
    [(1.001, 0.4), (1.0, 0.5), (0.8, 0.5), (0.799, 0.6), (0.0, 0.6)],
)
def test_threshold_steps_takes_a_fifth_above_the_slo_and_adds_a_tenth_well_below(
    ratio: float, wanted: float
) -> None:
    assert ThresholdSteps().next(0.5, _at(ratio)) == pytest.approx(wanted)


@pytest.mark.parametrize(("ratio", "wanted"), [(1.001, 0.25), (1.0, 0.52), (0.0, 0.52)])
def test_aimd_halves_above_the_slo_and_adds_a_fiftieth_otherwise(
    ratio: float, wanted: float
) -> None:
    assert Aimd().next(0.5, _at(ratio)) == pytest.approx(wanted)


def test_pi_rests_at_its_set_point_and_falls_by_the_error_and_its_sum() -> None:
    # At 1.3 the error is -0.5: 0.01 from the integral each second, and 0.1 at once.
    assert _moves(PlainPi(), 0.0, [0.8, 1.3, 1.3, 0.8]) == pytest.approx([1.0, 0.89, 0.88, 0.98])


def test_pi_counts_no_ratio_above_two() -> None:
    assert _moves(PlainPi(), 0.0, [50.0]) == pytest.approx([1.0 - 0.02 * 1.2 - 0.2 * 1.2])


def test_pi_does_not_wind_up_at_either_end() -> None:
    rule = PlainPi()
    _moves(rule, 1.0, [0.0] * 500)
    assert _moves(rule, 1.0, [1.3]) == pytest.approx([0.89])
    _moves(rule, 0.0, [2.0] * 500)
    assert _moves(rule, 0.0, [0.3]) == pytest.approx([0.01 + 0.1])


def test_smoothed_ratio_steps_by_the_smoothed_ratio_alone() -> None:
    # Smoothed: 0.30, 0.51, 0.657, 0.4599, 0.3219.
    moves = _moves(SmoothedRatio(), 0.5, [1.0, 1.0, 1.0, 0.0, 0.0])
    assert moves == pytest.approx([0.55, 0.5, 0.4, 0.5, 0.55])


def test_smoothed_ratio_counts_no_ratio_above_two() -> None:
    # 0.6 is above the band, and a zero later 0.42 is within: from 50 it would be 10.5.
    assert _moves(SmoothedRatio(), 0.5, [50.0, 0.0]) == pytest.approx([0.4, 0.5])


def test_gradient_grows_by_a_quarter_and_the_root_while_latency_is_smallest() -> None:
    wanted = Gradient().next(0.64, _at(0.5, 0.1, 0.01))
    assert wanted == pytest.approx((64 * 1.25 + 8) / 100)


def test_gradient_falls_as_the_worse_median_rises() -> None:
    rule = Gradient()
    rule.next(0.64, _at(0.5, 0.1, 0.01))
    assert rule.next(0.64, _at(0.5, 0.2, 0.01)) == pytest.approx((64 * 0.625 + 8) / 100)
    assert rule.next(0.64, _at(0.5, 0.1, 0.02)) == pytest.approx((64 * 0.625 + 8) / 100)


def test_gradient_never_takes_more_than_half_and_its_limit_is_one_at_least() -> None:
    rule = Gradient()
    rule.next(0.64, _at(0.5, 0.1, 0.01))
    assert rule.next(0.64, _at(0.5, 9.0, 0.01)) == pytest.approx((64 * 0.5 + 8) / 100)
    assert rule.next(0.0, _at(0.5, 9.0, 0.01)) == pytest.approx((1 * 0.5 + 1) / 100)


def test_gradient_forgets_a_smallest_median_after_ten_minutes() -> None:
    rule = Gradient()
    rule.next(0.64, _at(0.5, 0.1, 0.01))
    slow = [rule.next(0.64, _at(0.5, 0.2, 0.01)) for _ in range(120)]
    assert slow[118] == pytest.approx((64 * 0.625 + 8) / 100)
    assert slow[119] == pytest.approx((64 * 1.25 + 8) / 100)
    assert 120 * rule.period_seconds == 600


def test_gradient_stays_where_it_is_without_both_medians() -> None:
    assert Gradient().next(0.64, _at(0.5, 0.1)) == 0.64
    assert Gradient().next(0.64, _at(0.0)) == 0.64


class _Recorder:
    """A rule that wants what it is given, and keeps what it saw."""

    period_seconds, window_seconds = 5.0, 10.0

    def __init__(self, wanted: float = 1.0) -> None:
        self.wanted, self.seen = wanted, list[Observed]()

    def next(self, position: float, observed: Observed) -> float:
        self.seen.append(observed)
        return self.wanted


def _settings(**slo: float | None) -> Settings:
    promised = {"ttft_seconds": 0.5, "itl_seconds": 0.2} | slo
    return parse_settings({"table": "made by hand", "slo": promised})


def _histogram(counts: Sequence[int]) -> dict[str, Histogram]:
    """Cumulative counts by edge; no sum."""
    return {"engine": Histogram(EDGES, tuple(map(float, counts)), 0.0)}


def _reading(seconds: float, ttft: Sequence[int], itl: Sequence[int]) -> Scrape:
    reading = Reading(
        taken_at_seconds=seconds,
        ttft=_histogram(ttft),
        itl=_histogram(itl),
        queue_requests=0.0,
        running_requests=1.0,
    )
    return Scrape(reading, 0)


NO_EVENTS = (0, 0, 0, 0, 0, 0)


def test_a_rule_sees_the_worse_quantile_over_its_slo_and_both_medians() -> None:
    rule = _Recorder()
    law = RivalLaw(rule, _settings(), RANGES)
    law.tick(0.0, _reading(0.0, NO_EVENTS, NO_EVENTS))
    # 100 first tokens evenly from 0.2 to 0.5 s, 100 gaps evenly up to 0.1 s.
    law.tick(10.0, _reading(10.0, (0, 0, 100, 100, 100, 100), (100,) * 6))
    assert rule.seen[0] == _at(0.0)
    assert rule.seen[1].worst_ratio == pytest.approx((0.2 + 0.95 * 0.3) / 0.5)
    assert rule.seen[1].medians_seconds == pytest.approx((0.35, 0.05))
    # 100 gaps more, from 0.5 to 1 s, and as many first tokens as before.
    law.tick(20.0, _reading(20.0, (0, 0, 200, 200, 200, 200), (100, 100, 100, 200, 200, 200)))
    assert rule.seen[2].worst_ratio == pytest.approx((0.5 + 0.95 * 0.5) / 0.2)
    assert rule.seen[2].medians_seconds == pytest.approx((0.35, 0.75))


def test_a_latency_without_an_slo_or_without_events_is_left_out() -> None:
    rule = _Recorder()
    law = RivalLaw(rule, _settings(itl_seconds=None), RANGES)
    law.tick(0.0, _reading(0.0, NO_EVENTS, NO_EVENTS))
    law.tick(10.0, _reading(10.0, (100,) * 6, (0, 0, 0, 0, 0, 100)))
    assert rule.seen[-1].worst_ratio == pytest.approx(0.95 * 0.1 / 0.5)
    assert len(rule.seen[-1].medians_seconds) == 1
    rule = _Recorder()
    law = RivalLaw(rule, _settings(), RANGES)
    law.tick(0.0, _reading(0.0, NO_EVENTS, NO_EVENTS))
    law.tick(10.0, _reading(10.0, NO_EVENTS, (100,) * 6))
    assert rule.seen[-1].worst_ratio == pytest.approx(0.95 * 0.1 / 0.2)


def test_a_rule_judges_its_window_and_no_event_before() -> None:
    """A hundred slow events by second 10, then a hundred fast ones in the window of 10 s."""
    rule = _Recorder()
    law = RivalLaw(rule, _settings(), RANGES)
    law.tick(0.0, _reading(0.0, NO_EVENTS, NO_EVENTS))
    law.tick(10.0, _reading(10.0, (0, 0, 0, 0, 100, 100), (100,) * 6))
    law.tick(20.0, _reading(20.0, (100, 100, 100, 100, 200, 200), (200,) * 6))
    assert rule.seen[-1].worst_ratio == pytest.approx(0.95 * 0.1 / 0.2)  # of the token gaps


def test_a_window_of_few_events_grows_by_half_and_no_further() -> None:
    """Two fast events in the last 10 s are too few; those of 15 s ago are too long ago."""
    rule = _Recorder()
    law = RivalLaw(rule, _settings(itl_seconds=None), RANGES)
    law.tick(0.0, _reading(0.0, NO_EVENTS, NO_EVENTS))
    law.tick(4.0, _reading(4.0, (0, 0, 0, 0, 50, 50), NO_EVENTS))
    law.tick(8.0, _reading(8.0, (0, 0, 0, 50, 100, 100), NO_EVENTS))
    law.tick(20.0, _reading(20.0, (2, 2, 2, 52, 102, 102), NO_EVENTS))
    # The window begins at second 8: that of second 4 is more than 15 s ago.
    assert rule.seen[-1].worst_ratio == pytest.approx(0.95 * 0.1 / 0.5)


def test_a_rule_decides_once_a_period_and_not_on_stale_readings() -> None:
    rule = _Recorder()
    law = RivalLaw(rule, _settings(), RANGES)
    for tick in range(20):
        law.tick(0.5 * tick, _reading(0.5 * tick, NO_EVENTS, NO_EVENTS))
    assert len(rule.seen) == 2  # at seconds 0 and 5
    kept = _reading(9.5, NO_EVENTS, NO_EVENTS)
    for tick in range(20, 60):
        law.tick(0.5 * tick, kept)
    assert len(rule.seen) == 3  # at second 10; from 14.5 on the reading is too old


def test_a_position_is_clamped_and_moves_both_phases() -> None:
    rule = _Recorder()
    law = RivalLaw(rule, _settings(), RANGES)
    budgets = []
    for number, wanted in enumerate((1.7, 0.5, -0.3)):
        rule.wanted = wanted
        scrape = _reading(5.0 * number, NO_EVENTS, NO_EVENTS)
        budgets.append(law.tick(5.0 * number, scrape).budgets)
    assert budgets == [(100, 20), (50, 15), (0, 10)]


def test_a_rival_begins_at_full_quality_before_any_reading() -> None:
    rule = _Recorder(0.0)
    assert RivalLaw(rule, _settings(), RANGES).tick(0.0, Scrape(None, 0)).budgets == (100, 20)
    assert rule.seen == []
