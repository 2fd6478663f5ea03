"""Whole decisions of the law that looks ahead, from views built by hand."""

from dataclasses import replace

import pytest
from law_views import make_constants, make_sample, make_seen, make_state, positions_of

from sglang_alloc_controller.budget_range import BudgetRange
from sglang_alloc_controller.control_law import decide, not_taken
from sglang_alloc_controller.law_state import Decision, LawConstants, LawState, Reason, Seen
from sglang_alloc_controller.load_history import LoadWindow
from sglang_alloc_controller.reading_history import Newest, Sample
from sglang_alloc_controller.samples import InputState, Phase, Slo

# Work of a request at full: 100 prompt tokens in 0.1 s, 10 tokens in 0.025 s. Each phase's floor
# halves it, for 0.1 nats of prefill and 0.01 of decode.
RANGES: dict[Phase, BudgetRange] = {
    "prefill": BudgetRange(
        10, 40, (10, 40), (1.024, 2.048), (0.1, 0.0), (100.0, 2048.0), ((0.05, 1.024), (0.1, 2.048))
    ),
    "decode": BudgetRange(
        10, 40, (10, 40), (0.01, 0.02), (0.01, 0.0), (8.0, 16.0), ((0.01, 0.02), (0.02, 0.04))
    ),
}
CONSTANTS = make_constants(RANGES)
# Utilisation at full, over the slack of 0.9: 0.28 and 1.04; with both at their floors 0.52.
CALM, RUSH = 2.0, 7.5


def _windows(*pieces: tuple[float, float]) -> tuple[LoadWindow, ...]:
    """Windows that reach back over each (seconds, requests per second), the newest first."""
    found, seconds, arrivals = [], 0.0, 0.0
    for length, rate in pieces:
        seconds, arrivals = seconds + length, arrivals + length * rate
        found.append(LoadWindow(seconds, arrivals, arrivals, 100 * arrivals, 10 * arrivals))
    return tuple(found)


def _steady(rate: float, seconds: float) -> tuple[LoadWindow, ...]:
    return _windows((5.0, rate), (seconds - 5.0, rate))


def _seen(now_seconds: float, windows: tuple[LoadWindow, ...], **fields: object) -> Seen:
    view = make_seen(now_seconds, queue_requests=float(str(fields.pop("queue", 0.0))))
    return view._replace(load_windows=windows, running_requests=16.0, **fields)


def _decided(
    state: LawState, *views: Seen, constants: LawConstants = CONSTANTS
) -> tuple[LawState, Decision]:
    for view in views:
        state, decision = decide(state, view, constants)
    return state, decision


def test_a_load_that_full_quality_carries_keeps_it() -> None:
    state, decision = _decided(make_state(), _seen(100.0, _steady(CALM, 100.0)))
    assert positions_of(state) == (1.0, 1.0)
    assert set(decision.reasons.values()) == {Reason.AT_CEILING}
    assert decision.saturation_ratio == 0


def test_a_rush_is_answered_before_anything_is_late() -> None:
    state, decision = _decided(
        make_state(),
        _seen(100.0, _steady(CALM, 100.0)),
        _seen(106.0, _windows((6.0, RUSH), (94.0, CALM))),
    )
    # Most would be late at full, a third with decode at its floor, and next to none with prefill's.
    assert positions_of(state) == (0.0, 1.0)
    assert decision.reasons["prefill"] is Reason.PREDICTED_OVERLOAD
    assert state.forward is not None
    assert state.forward.load_since_seconds == 100.0
    assert state.forward.before_per_second == CALM


def test_without_any_change_seen_nothing_is_given_up_in_the_first_half_minute() -> None:
    first = _seen(20.0, _steady(RUSH, 20.0))
    state, decision = _decided(make_state(), first)
    assert positions_of(state) == (1.0, 1.0)
    assert set(decision.reasons.values()) == {Reason.AT_CEILING}
    state, _ = _decided(make_state(), first, _seen(40.0, _steady(RUSH, 40.0)))
    assert positions_of(state) == (0.0, 1.0)


@pytest.mark.parametrize(("now_seconds", "cut"), [(14.0, False), (16.0, True)])
def test_a_violation_at_the_start_is_answered_when_the_rate_is_known(
    now_seconds: float, cut: bool
) -> None:
    waiting = _seen(now_seconds, _steady(RUSH, now_seconds), queue=40.0)
    state, _ = _decided(make_state(), waiting)
    assert (min(positions_of(state)) < 1) is cut


def test_what_is_cheap_goes_first() -> None:
    state, _ = _decided(make_state(), _seen(100.0, _steady(6.0, 100.0)))
    assert positions_of(state) == (1.0, 0.0)
    state, _ = _decided(make_state(), _seen(100.0, _steady(12.0, 100.0)))
    assert positions_of(state) == (0.0, 0.0)


def test_quality_comes_back_when_the_load_falls_and_the_queue_is_gone() -> None:
    rush = _seen(100.0, _steady(RUSH, 100.0))
    state, _ = _decided(make_state(), rush)
    low = positions_of(state)
    calm = _windows((15.0, CALM), (85.0, RUSH))
    waiting = _seen(115.0, calm, queue=3.0)
    _, decision = _decided(state, waiting)
    assert decision.reasons["prefill"] is Reason.DRAINING
    state, decision = _decided(state, _seen(115.0, calm))
    assert positions_of(state) > low
    assert decision.reasons["prefill"] is Reason.RESTORE


def test_changes_under_one_load_are_ever_further_apart() -> None:
    """The load is known for 100 s at the first change: the second may come after 200 s more."""
    state, _ = _decided(make_state(), _seen(100.0, _steady(6.0, 100.0)))
    changed = positions_of(state)
    # A load that is a little smaller than it was thought to be, and no other one.
    for now_seconds in (150.0, 299.0):
        state, decision = _decided(state, _seen(now_seconds, _steady(5.3, now_seconds)))
        assert positions_of(state) == changed
    assert decision.reasons["decode"] is Reason.HOLD
    state, decision = _decided(state, _seen(301.0, _steady(5.3, 301.0)))
    assert positions_of(state) > changed


def test_a_server_that_has_become_another_is_known_anew() -> None:
    """The load is known for 100 s at the first change, and the server then for 10 s."""
    state, _ = _decided(make_state(), _seen(100.0, _steady(6.0, 100.0)))
    changed = positions_of(state)
    assert state.forward is not None
    other = replace(state, forward=state.forward._replace(server_since_seconds=90.0))
    for known, moves in ((state, False), (other, True)):
        later, _ = _decided(known, _seen(150.0, _steady(5.3, 150.0)))
        assert (positions_of(later) > changed) is moves


def test_soon_after_a_change_of_the_load_budgets_come_back_sooner() -> None:
    """Cut when the load is known for 50 s: back after 50 s more, and not after 100 s."""
    state, _ = _decided(make_state(), _seen(100.0, _steady(CALM, 100.0)))
    state, _ = _decided(
        state,
        _seen(106.0, _windows((6.0, 4.0), (94.0, CALM))),
        _seen(150.0, _windows((50.0, 6.0), (100.0, CALM))),
    )
    low = positions_of(state)
    assert state.forward is not None
    assert (low, state.forward.load_since_seconds) == ((1.0, 0.0), 100.0)
    held, decision = _decided(state, _seen(198.0, _steady(5.3, 98.0)))
    assert positions_of(held) == low
    assert decision.reasons["decode"] is Reason.HOLD
    back, _ = _decided(state, _seen(202.0, _steady(5.3, 102.0)))
    assert positions_of(back) > low


def test_what_is_late_while_the_load_rises_is_not_blamed_on_the_server() -> None:
    late = Newest(1.0, 6.0, 0.5)
    learned = []
    for windows in (_steady(6.0, 300.0), _windows((100.0, 6.7), (200.0, 5.65))):
        state, _ = _decided(make_state(), _seen(300.0, windows, newest=late), _seen(316.0, windows))
        assert state.forward is not None
        assert state.forward.load is not None
        assert state.forward.load.rate_per_second == pytest.approx(6.0)
        learned.append(state.forward.critical)
    assert learned[0] < learned[1]


def test_a_deep_cut_that_is_needless_is_not_kept_for_long() -> None:
    state, _ = _decided(make_state(), _seen(100.0, _steady(RUSH, 100.0)))
    assert positions_of(state) == (0.0, 1.0)
    kept, decision = _decided(state, _seen(219.0, _steady(4.0, 219.0)))
    assert positions_of(kept) == (0.0, 1.0)
    assert decision.reasons["prefill"] is Reason.HOLD
    back, _ = _decided(state, _seen(221.0, _steady(4.0, 221.0)))
    assert positions_of(back) == (1.0, 1.0)


def test_a_queue_counts_as_load_only_while_the_load_is_young() -> None:
    young = _windows((6.0, 4.5), (94.0, 1.0))
    before = _seen(100.0, _steady(1.0, 100.0))
    kept, _ = _decided(make_state(), before, _seen(106.0, young))
    drained, _ = _decided(make_state(), before, _seen(106.0, young, queue=40.0))
    assert positions_of(drained) < positions_of(kept)
    old, _ = _decided(make_state(), _seen(100.0, _steady(1.0, 100.0), queue=40.0))
    assert positions_of(old) == (1.0, 1.0)


@pytest.mark.parametrize(("queue", "rate"), [(40.0, 5.0), (40.0, 4.0), (3.0, 5.0)])
def test_a_queue_is_worked_off_under_a_load_that_rose_and_waited_for_under_a_calm_one(
    queue: float, rate: float
) -> None:
    """Full carries 4 and 5 requests a second; the budgets were chosen for 4."""
    state, _ = _decided(make_state(), _seen(100.0, _steady(4.0, 100.0)))
    assert state.forward is not None
    assert state.forward.load is not None
    chosen = state.forward._replace(chosen_for=state.forward.load)
    state = replace(state, forward=chosen)
    windows = _windows((5.0, rate), (290.0, rate), (305.0, rate))
    state, _ = _decided(state, _seen(600.0, windows, queue=queue))
    worked_off = min(positions_of(state)) < 1
    assert worked_off is (queue > 6.0 and rate > 4.5)


def test_late_answers_of_a_reading_that_spans_a_change_teach_nothing() -> None:
    state, _ = _decided(make_state(), _seen(100.0, _steady(RUSH, 100.0)))
    assert min(positions_of(state)) < 1
    for seconds, kept in ((1.0, 1), (60.0, 0)):
        late = Newest(seconds, 300.0, 0.9)
        after, _ = _decided(state, _seen(130.0, _steady(RUSH, 130.0), newest=late))
        assert after.forward is not None
        assert len(after.forward.pending) == kept


def test_late_answers_teach_after_a_delay_and_not_if_the_load_changed_meanwhile() -> None:
    late = Newest(1.0, 6.0, 0.5)
    state, _ = _decided(make_state(), _seen(100.0, _steady(4.0, 100.0), newest=late))
    assert state.forward is not None
    prior = state.forward.critical
    assert len(state.forward.pending) == 1
    learned, _ = _decided(state, _seen(116.0, _steady(4.0, 116.0)))
    assert learned.forward is not None
    assert learned.forward.critical < prior
    # Dated before the late answers: they were the other load's.
    changed, _ = _decided(state, _seen(110.0, _windows((13.0, 12.0), (97.0, 4.0))))
    assert changed.forward is not None
    assert changed.forward.pending == ()
    assert changed.forward.critical == prior


def test_loads_that_came_and_went_are_insured_against() -> None:
    constants = make_constants(RANGES, load_miss_price_nats=5.0)
    state, _ = _decided(make_state(), _seen(100.0, _steady(CALM, 100.0)), constants=constants)
    assert positions_of(state) == (1.0, 1.0)
    assert state.forward is not None
    peaks = tuple((90.0, RUSH) for _ in range(5))
    state = replace(state, forward=state.forward._replace(peaks=peaks))
    insured, _ = _decided(state, _seen(120.0, _steady(CALM, 120.0)), constants=constants)
    assert positions_of(insured) == (1.0, 0.0)
    # Half an hour later they are forgotten.
    later, _ = _decided(state, _seen(2000.0, _steady(CALM, 900.0)), constants=constants)
    assert positions_of(later) == (1.0, 1.0)


def test_a_rate_that_drifted_away_without_a_jump_is_followed_after_two_minutes() -> None:
    start = _seen(100.0, _steady(RUSH, 100.0))
    state, _ = _decided(make_state(), start)
    low = positions_of(state)
    assert min(low) < 1
    # No jump in the windows; without the drift a change would have to wait until 300 s.
    slow = RUSH - 1.5
    held, _ = _decided(state, _seen(210.0, _steady(slow, 210.0)))
    assert positions_of(held) == low
    followed, _ = _decided(state, _seen(221.0, _steady(slow, 221.0)))
    assert positions_of(followed) > low
    # The same rate again is no reason to move, and one that chance explains has to wait.
    near, _ = _decided(state, _seen(221.0, _steady(RUSH - 0.3, 221.0)))
    assert positions_of(near) == low


def test_a_rate_that_falls_steadily_is_followed_after_a_minute() -> None:
    state, _ = _decided(make_state(), _seen(600.0, _steady(6.1, 600.0)))
    low = positions_of(state)
    assert low == (1.0, 0.0)

    def fallen(newest_seconds: float) -> Seen:
        pieces = ((newest_seconds, 4.9), (100.0, 5.5), (135.0, 5.7), (365.0, 6.1))
        return _seen(600.0 + newest_seconds, _windows(*pieces))

    held, _ = _decided(state, fallen(55.0))
    assert positions_of(held) == low
    followed, _ = _decided(state, fallen(65.0))
    assert positions_of(followed) == (1.0, 1.0)
    # As slow a load that does not move has to be known for longer.
    near, _ = _decided(state, _seen(665.0, _steady(5.46, 665.0)))
    assert positions_of(near) == low


def test_after_somebody_else_moved_the_budgets_the_law_does_not_wait() -> None:
    state, _ = _decided(make_state(), _seen(100.0, _steady(RUSH, 100.0)))
    low = positions_of(state)
    for now_seconds in (120.0, 136.0, 142.0, 148.0, 200.0):
        stale = make_seen(now_seconds, state=InputState.STALE)
        state, _ = _decided(state, stale)
    assert positions_of(state) > low
    state, _ = _decided(
        state, _seen(204.0, _steady(RUSH, 204.0)), _seen(240.0, _steady(RUSH, 36.0))
    )
    assert positions_of(state) == low


def test_a_load_beyond_the_floor_is_at_the_floor_and_infeasible_after_a_while() -> None:
    state = make_state()
    for now_seconds in (100.0, 110.0, 120.0, 150.0):
        view = _seen(now_seconds, _steady(40.0, now_seconds), queue=40.0)
        state, decision = _decided(state, view)
    assert positions_of(state) == (0.0, 0.0)
    assert set(decision.reasons.values()) == {Reason.INFEASIBLE}
    assert decision.saturation_ratio == 1.0


def test_a_reading_is_judged_once_and_budgets_stay_within_their_bounds() -> None:
    view = _seen(106.0, _windows((6.0, RUSH), (94.0, CALM)))
    state, _ = _decided(make_state(), _seen(100.0, _steady(CALM, 100.0)), view)
    again, _ = decide(state, view._replace(now_seconds=106.5), CONSTANTS)
    assert again.phases == state.phases
    assert again.forward == state.forward
    for phase in ("prefill", "decode"):
        assert 0.0 <= state.phases[phase].position <= 1.0


@pytest.mark.parametrize(
    ("within_ratio", "span_seconds", "critical"),
    [(0.5, 30.0, 0.39), (0.5, 20.0, 0.85), (0.95, 30.0, 0.85)],
)
def test_a_server_that_is_far_slower_than_its_bench_is_believed_within_a_minute(
    within_ratio: float, span_seconds: float, critical: float
) -> None:
    """Far from what is predicted, late answers taught next to nothing, and full quality stayed."""
    late = make_sample(within_ratio, span_seconds=span_seconds)
    state = make_state()
    for number in range(60):
        view = _seen(100.0 + number, _steady(CALM, 100.0 + number))
        long_samples: dict[Slo, Sample | None] = {"ttft": late, "itl": None}
        state, _ = decide(state, view._replace(long_samples=long_samples), CONSTANTS)
    assert state.forward is not None
    assert state.forward.critical == pytest.approx(critical, abs=0.01)


@pytest.mark.parametrize(("seconds", "lowered"), [(100.0, True), (40.0, False)])
def test_without_a_first_token_in_a_minute_a_queue_is_answered_by_itself(
    seconds: float, lowered: bool
) -> None:
    """As where no request streams: the load cannot be told, and was waited for without end."""
    windows = tuple(one._replace(requests=0.0) for one in _steady(RUSH, seconds))
    view = _seen(100.0, windows, queue=8.0)
    state, decision = decide(make_state(), view, CONSTANTS)
    assert (min(positions_of(state)) < 1.0) is lowered
    assert (Reason.QUEUE_SLO in decision.reasons.values()) is lowered


@pytest.mark.parametrize("rate", [0.0, 1e-6, 1e6])
def test_an_impossible_rate_breaks_nothing(rate: float) -> None:
    state, _ = _decided(make_state(), _seen(100.0, _steady(rate, 100.0)))
    assert all(0.0 <= position <= 1.0 for position in positions_of(state))


def test_a_decision_that_is_not_carried_out_is_the_same_with_the_next_reading() -> None:
    """As in shadow mode: full quality stays in force, and nobody has moved it back."""
    state, wanted = make_state(), []
    for number in range(100):
        seen = _seen(100.0 + number, _steady(RUSH, 100.0 + number))
        after, decision = decide(state, seen, CONSTANTS)
        state = not_taken(state, after, CONSTANTS)
        wanted.append(tuple(decision.positions.values()))
    assert len(set(wanted)) == 1
    assert wanted[0] != (1.0, 1.0)
    assert positions_of(state) == (1.0, 1.0)
    assert state.forward is not None
    assert state.forward.alarm_at_seconds < 0
    assert state.forward.critical == pytest.approx(0.82, abs=0.05)
