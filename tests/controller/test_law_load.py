"""What arrives and what a server carries, computed by hand."""

import math

import pytest
from law_views import make_constants

from sglang_alloc_controller.budget_range import BudgetRange
from sglang_alloc_controller.law_capacity import (
    Critical,
    Levels,
    best,
    choices,
    learned_from,
    prior,
)
from sglang_alloc_controller.law_load import Load, load_of
from sglang_alloc_controller.load_history import LoadHistory, LoadWindow
from sglang_alloc_controller.samples import Histogram, Phase, Reading

LAW = make_constants().law
RANGES: dict[Phase, BudgetRange] = {
    "prefill": BudgetRange(
        10, 40, (10, 40), (1.024, 2.048), (0.2, 0.0), (2048.0,), ((1.024,), (2.048,))
    ),
    "decode": BudgetRange(
        10, 40, (10, 40), (0.01, 0.02), (0.1, 0.0), (8.0, 16.0), ((0.01, 0.02), (0.02, 0.04))
    ),
}
# 100 prompt tokens of 1 ms, and 10 tokens of 0.04 / 16 s: 0.1 + 0.025 s of work at full.
LOAD = Load(4.0, 5.0, 6.0, 5.0, 100.0, 10.0, 100.0, 100.0)


def _window(seconds: float, per_second: float) -> LoadWindow:
    arrivals = seconds * per_second
    return LoadWindow(seconds, arrivals, arrivals, 100 * arrivals, 10 * arrivals)


def test_a_load_that_stays_is_known_the_better_the_longer_it_is_counted() -> None:
    short = load_of([_window(6, 5.0)], LAW)
    long = load_of([_window(6, 5.0), _window(100, 5.0), _window(900, 5.0)], LAW)
    assert short is not None
    assert long is not None
    assert short.low_per_second < long.low_per_second < 5.0 < long.high_per_second
    assert long.high_per_second < 5.5 < short.high_per_second
    assert (long.prefill_tokens, long.decode_tokens) == (100.0, 10.0)


def test_a_window_that_reaches_back_into_another_load_does_not_count() -> None:
    load = load_of([_window(6, 12.0), _window(12, 12.0), _window(100, 3.0)], LAW)
    assert load is not None
    assert load.same_seconds == 12.0
    assert load.likely_per_second == 12.0


def test_too_few_requests_say_nothing() -> None:
    assert load_of([_window(3, 0.5)], LAW) is None
    assert load_of([], LAW) is None


def test_a_queue_that_grows_counts_as_arrivals_and_one_absurd_gauge_does_not() -> None:
    history = LoadHistory()
    for second, queue in enumerate((0.0, 0.0, 2.0, 1e6, 6.0, 8.0)):
        counts = Histogram((math.inf,), (5.0 * second,), 0.0)
        history.add(Reading(float(second), {"m": counts}, {}, queue, 1.0, prefill_tokens=0.0))
    newest = history.windows()[-1]
    assert newest.arrivals == pytest.approx(25.0 + 8.0)
    history.clear()
    assert history.windows() == ()


def test_the_work_of_a_request_is_its_prompt_and_its_share_of_decode_steps() -> None:
    found = choices(LOAD, RANGES, 16.0, LAW)
    assert found[0].levels == Levels(1, 1)
    assert found[0].work_seconds == pytest.approx(0.1 + 0.025)
    assert [one.loss for one in found] == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_the_smallest_loss_is_kept_while_it_carries_the_load_and_late_answers_have_a_price() -> (
    None
):
    found = choices(LOAD, RANGES, 16.0, LAW)
    critical = Critical(0.7, 1.0)
    assert best(found, 4.0, critical, 0.95, LAW).levels == Levels(1, 1)
    # Utilisation 0.75 at full breaks the SLO, 0.675 with decode at its floor does not.
    assert best(found, 6.0, critical, 0.95, LAW).levels == Levels(1, 0)
    assert best(found, 100.0, critical, 0.95, LAW).levels == Levels(0, 0)


def test_more_misses_than_expected_lower_the_critical_utilisation_and_fewer_raise_it() -> None:
    def after(missed_ratio: float, utilisation: float = 0.7) -> float:
        return learned_from(
            prior(LAW),
            utilisation=utilisation,
            requests=50.0,
            missed_ratio=missed_ratio,
            seconds=1.0,
            objective_ratio=0.95,
            law=LAW,
        ).utilisation

    assert after(0.2) < 0.7 < after(0.0)
    assert after(0.05 * 1.05) == pytest.approx(0.7)
    # On a server with little to do neither says anything.
    assert after(1.0, utilisation=0.1) == pytest.approx(0.7, abs=1e-4)
