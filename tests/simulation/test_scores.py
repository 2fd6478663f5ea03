"""Scores of small runs that were made up, by hand; and how long a run was below full quality."""

import math
from collections.abc import Sequence

import pytest
from small_worlds import FLOOR, FULL, make_plant, make_workload

from sglang_alloc.shared_table import CalmBudgets
from sglang_alloc_controller.settings import SloSettings
from sglang_alloc_controller.simulator.engine import Outcome
from sglang_alloc_controller.simulator.laws import Order, Scrape
from sglang_alloc_controller.simulator.plant import Plant
from sglang_alloc_controller.simulator.run_law import Change, Run, run_law
from sglang_alloc_controller.simulator.scenarios import Scenario
from sglang_alloc_controller.simulator.scores import Score, score, within_slo
from sglang_alloc_controller.simulator.workload import Workload

SLO = SloSettings(ttft_seconds=0.5, itl_seconds=0.1)
AT_FULL, AT_FLOOR = (FULL, FULL), (FLOOR, FLOOR)


def _scenario(seconds: float, disturbed_at_seconds: float | None = None) -> Scenario:
    return Scenario(
        "made up",
        seconds,
        lambda capacities, seed: lambda now: 0.0,
        0.0,
        disturbed_at_seconds=disturbed_at_seconds,
    )


def _outcome(request: int, *, ttft: float = 0.1, itl: float = 0.01, lost: bool = False) -> Outcome:
    return Outcome(request, 1.0, ttft, itl, lost)


def _made_up(
    requests: Sequence[tuple[float, bool]],
    changes: Sequence[Change] = (Change(0.0, AT_FULL),),
    seconds: float = 120.0,
    disturbed_at_seconds: float | None = None,
) -> Run:
    """A run with requests of (arrival second, whether it kept the SLOs), in order of arrival."""
    return Run(
        scenario=_scenario(seconds, disturbed_at_seconds),
        workload=make_workload(*((arrival, 100, 5) for arrival, _ in requests)),
        outcomes=tuple(
            _outcome(number, ttft=0.1 if kept else 9.0) for number, (_, kept) in enumerate(requests)
        ),
        changes=tuple(changes),
        queue=(),
        mean_loss=0.25,
        below_full_seconds=17.0,
        end_seconds=seconds,
    )


def _score(run: Run) -> Score:
    return score(run, make_plant(), SLO)


def _requests(count: int, kept: int, from_second: float) -> list[tuple[float, bool]]:
    """So many requests, a tenth of a second apart; the first `kept` of them are in time."""
    return [(from_second + 0.1 * number, number < kept) for number in range(count)]


@pytest.mark.parametrize(
    ("outcome", "kept"),
    [
        (_outcome(0, ttft=0.5, itl=0.1), True),
        (_outcome(0, ttft=0.501, itl=0.1), False),
        (_outcome(0, ttft=0.5, itl=0.101), False),
        (_outcome(0, ttft=0.1, itl=0.01, lost=True), False),
        (_outcome(0, ttft=math.nan, itl=math.nan, lost=True), False),
    ],
)
def test_a_request_keeps_both_slos_at_their_edges_and_a_lost_one_none(
    outcome: Outcome, kept: bool
) -> None:
    assert within_slo(outcome, SLO) is kept


def test_a_latency_that_is_not_promised_is_kept_by_all_but_the_lost() -> None:
    only_itl = SloSettings(ttft_seconds=None, itl_seconds=0.1)
    only_ttft = SloSettings(ttft_seconds=0.5, itl_seconds=None)
    late = _outcome(0, ttft=9.0, itl=0.01)
    assert within_slo(late, only_itl)
    assert not within_slo(late, only_ttft)
    assert within_slo(_outcome(0, ttft=0.1, itl=9.0), only_ttft)
    assert not within_slo(_outcome(0, lost=True), only_itl)


def test_attainment_and_goodput_count_every_request() -> None:
    found = _score(_made_up([*_requests(20, 15, 0.0), *_requests(20, 20, 60.0)]))
    assert found.slo_attainment_ratio == pytest.approx(35 / 40)
    assert found.goodput_per_second == pytest.approx(35 / 120)
    assert found.mean_predicted_loss == 0.25
    assert found.seconds_below_full == 17.0


def test_changes_are_counted_by_the_hour_and_the_beginning_is_none() -> None:
    changes = [Change(0.0, AT_FULL), Change(30.0, AT_FLOOR), Change(60.0, AT_FULL)]
    assert _score(_made_up([], changes, 120.0)).changes_per_hour == pytest.approx(2 * 30)
    assert _score(_made_up([], changes[:1], 120.0)).changes_per_hour == 0


def test_the_worst_minute_is_the_worst_of_those_with_ten_requests() -> None:
    busy = [*_requests(20, 15, 0.0), *_requests(10, 9, 60.0)]
    few_late = _requests(9, 0, 120.0)
    found = _score(_made_up([*busy, *few_late], seconds=180.0))
    assert found.worst_minute_ratio == pytest.approx(0.75)
    # One more, and that minute counts.
    found = _score(_made_up([*busy, *_requests(10, 0, 120.0)], seconds=180.0))
    assert found.worst_minute_ratio == 0.0


def test_a_request_belongs_to_the_minute_of_its_arrival() -> None:
    requests = [*_requests(10, 10, 58.9), *_requests(10, 0, 60.0)]
    assert requests[9][0] < 60.0
    assert _score(_made_up(requests)).worst_minute_ratio == 0.0


def test_a_run_without_requests_has_no_worst_minute() -> None:
    found = _score(_made_up([]))
    assert found.slo_attainment_ratio == 0.0
    assert math.isnan(found.worst_minute_ratio)


def test_without_a_disturbance_there_is_no_overshoot_and_no_settling() -> None:
    found = _score(_made_up(_requests(20, 0, 0.0)))
    assert math.isnan(found.overshoot_loss)
    assert math.isnan(found.settling_seconds)


def test_overshoot_is_the_largest_loss_after_the_disturbance_over_the_median_by_time() -> None:
    # Losses: 3 before; then 0 for 20 s, 1.2 for 30 s, 0.6 for 40 s and 0 for 10 s. By time the
    # half of 100 s is reached at 0.6.
    changes = [
        Change(0.0, AT_FLOOR),
        Change(20.0, AT_FULL),
        Change(40.0, (8, 8)),
        Change(70.0, (9, 9)),
        Change(110.0, AT_FULL),
    ]
    run = _made_up([], changes, 120.0, disturbed_at_seconds=20.0)
    assert _score(run).overshoot_loss == pytest.approx(1.2 - 0.6)


def test_a_spell_that_the_disturbance_falls_into_counts_from_then_on() -> None:
    # 10 s of 3 after the disturbance, then 90 s of 0.6; the 20 s of 3 before would not matter.
    changes = [Change(0.0, AT_FLOOR), Change(30.0, (9, 9))]
    run = _made_up([], changes, 120.0, disturbed_at_seconds=20.0)
    assert _score(run).overshoot_loss == pytest.approx(3.0 - 0.6)
    # From second 30 on nothing else is in force.
    run = _made_up([], changes, 120.0, disturbed_at_seconds=30.0)
    assert _score(run).overshoot_loss == 0.0


def test_overshoot_goes_by_the_budgets_of_busy_steps() -> None:
    changes = [
        Change(0.0, AT_FULL),
        Change(30.0, AT_FLOOR, CalmBudgets(*AT_FULL)),
        Change(40.0, AT_FULL),
    ]
    run = _made_up([], changes, 120.0, disturbed_at_seconds=20.0)
    assert _score(run).overshoot_loss == pytest.approx(3.0)


def test_settling_lasts_until_the_end_of_the_last_half_minute_that_missed_the_objective() -> None:
    requests = [
        *_requests(20, 0, 0.0),  # before the disturbance
        *_requests(20, 10, 60.0),
        *_requests(20, 20, 90.0),
        *_requests(20, 18, 120.0),  # 0.9 is below the objective of 0.95
        *_requests(20, 19, 150.0),  # 0.95 is not
    ]
    run = _made_up(requests, seconds=180.0, disturbed_at_seconds=60.0)
    assert _score(run).settling_seconds == pytest.approx(150.0 - 60.0)


def test_half_minutes_with_few_requests_do_not_delay_settling() -> None:
    requests = [*_requests(20, 10, 60.0), *_requests(9, 0, 120.0)]
    run = _made_up(requests, seconds=180.0, disturbed_at_seconds=60.0)
    assert _score(run).settling_seconds == pytest.approx(30.0)


def test_settling_takes_no_time_when_nothing_is_missed_after_the_disturbance() -> None:
    requests = [*_requests(20, 0, 0.0), *_requests(20, 20, 60.0)]
    run = _made_up(requests, seconds=180.0, disturbed_at_seconds=60.0)
    assert _score(run).settling_seconds == 0.0


class _Scripted:
    """A law that was decided beforehand."""

    def __init__(self, *orders: tuple[float, Order]) -> None:
        self._orders = orders

    def tick(self, now_seconds: float, scrape: Scrape) -> Order:
        return next(order for since, order in reversed(self._orders) if since <= now_seconds)


def _below_full(
    workload: Workload, *orders: tuple[float, Order], seconds: float = 10.0, **plant: int
) -> float:
    made: Plant = make_plant(**plant)
    return run_law(
        _Scripted(*orders), _scenario(seconds), workload, made, seed=1
    ).below_full_seconds


IDLE = Workload((), (), ())
SPARED = Order(AT_FLOOR, CalmBudgets(*AT_FULL))


def test_one_pair_is_below_full_from_its_change_until_the_next_one() -> None:
    orders = (0.0, Order(AT_FULL)), (2.0, Order((FULL, FULL - 1))), (5.5, Order(AT_FULL))
    assert _below_full(IDLE, *orders) == 3.5
    assert _below_full(IDLE, (0.0, Order((FLOOR, FULL)))) == 10.0
    assert _below_full(IDLE, (0.0, Order(AT_FULL))) == 0.0


def test_the_last_piece_of_a_tick_counts_too() -> None:
    assert _below_full(IDLE, (0.0, Order(AT_FLOOR)), seconds=9.75) == 9.75


def test_calm_steps_below_full_count_as_one_pair_would() -> None:
    order = Order(AT_FLOOR, CalmBudgets(FULL - 1, FULL))
    assert _below_full(IDLE, (0.0, Order(AT_FULL)), (2.0, order)) == 8.0


def test_calm_steps_at_full_quality_are_not_below_it() -> None:
    """One request alone leaves nobody waiting, neither when it starts nor later."""
    assert _below_full(make_workload((1.0, 100, 90)), (0.0, SPARED)) == 0.0


def test_what_busy_steps_serve_is_below_full_between_two_looks() -> None:
    # Of two prompts of 200 tokens, 200 fit into a step: the first one leaves the other waiting,
    # from second 2.1 to 2.2, at half of 1 ms a token. All that comes after is calm.
    workload = make_workload((2.1, 200, 3), (2.1, 200, 3))
    assert _below_full(workload, (0.0, SPARED)) == 0.5


def test_a_phase_whose_budget_is_full_is_not_below_full_in_busy_steps() -> None:
    """Many run, so that decode steps are busy; nobody waits, so that no prefill step is."""
    workload = make_workload((2.1, 50, 20), (2.1, 50, 20), (2.1, 50, 20))
    calm = CalmBudgets(FULL, FULL, running_requests=3)
    assert _below_full(workload, (0.0, Order((FLOOR, FULL), calm))) == 0.0
    assert _below_full(workload, (0.0, Order((FULL, FLOOR), calm))) == 0.5
