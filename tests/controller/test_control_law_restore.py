"""The control law upwards, computed by hand: steps back, predictions, trials and waits."""

import math
from dataclasses import replace

import pytest
from law_views import make_constants, make_sample, make_seen, make_state, positions_of

from sglang_alloc_controller.control_law import decide
from sglang_alloc_controller.law_restore import affordable_step
from sglang_alloc_controller.law_state import LawState, Reason

CONSTANTS = make_constants()


def test_with_room_one_phase_at_a_time_gets_a_step_back_the_lower_first() -> None:
    state, decision = decide(make_state(0.6, 0.5), make_seen(100.0), CONSTANTS)
    assert positions_of(state) == (0.6, 0.6)
    assert decision.reasons == {"prefill": Reason.OTHER_PHASE_FIRST, "decode": Reason.RESTORE}
    state, decision = decide(state, make_seen(105.9), CONSTANTS)
    assert decision.reasons["prefill"] is Reason.HOLD
    state, _ = decide(state, make_seen(106.0), CONSTANTS)
    assert positions_of(state) == (0.7, 0.6)


def test_after_a_step_down_quality_stays_down_for_a_minute_while_the_load_stays() -> None:
    state, _ = decide(make_state(), make_seen(100.0, ttft=0.5), CONSTANTS)
    _, decision = decide(state, make_seen(159.9), CONSTANTS)
    assert decision.reasons["prefill"] is Reason.BACKOFF
    _, decision = decide(state, make_seen(160.0), CONSTANTS)
    assert decision.reasons["prefill"] is Reason.RESTORE


def test_when_the_load_has_gone_quality_comes_back_after_the_short_hold() -> None:
    state, _ = decide(make_state(), make_seen(100.0, ttft=0.5), CONSTANTS)
    _, decision = decide(state, make_seen(106.0, rate_per_second=6.9), CONSTANTS)
    assert decision.reasons["prefill"] is Reason.RESTORE


def test_a_queue_keeps_quality_from_coming_back() -> None:
    _, decision = decide(make_state(0.5, 0.5), make_seen(100.0, queue_requests=3.0), CONSTANTS)
    assert set(decision.reasons.values()) == {Reason.DEADBAND}


def test_a_step_back_is_as_large_as_the_prediction_affords() -> None:
    # 0.9 * 1.0 / 0.84 - 1 = 0.0714: growth 1 affords 7 per cent of the range.
    near = make_sample(1.0, quantile_seconds=0.84)
    state, decision = decide(make_state(0.5, 1.0), make_seen(100.0, ttft=near), CONSTANTS)
    assert decision.reasons["prefill"] is Reason.RESTORE
    assert positions_of(state) == (0.57, 1.0)


def test_a_step_back_that_is_predicted_to_violate_is_not_taken() -> None:
    near = make_sample(1.0, quantile_seconds=0.88)
    recent = make_state(0.5, 1.0)
    state = replace(
        recent,
        phases={n: replace(p, changed_at_seconds=90.0) for n, p in recent.phases.items()},
    )
    state, decision = decide(state, make_seen(149.0, ttft=near), CONSTANTS)
    assert decision.reasons["prefill"] is Reason.PREDICTED_VIOLATION
    state, decision = decide(state, make_seen(150.0, ttft=near), CONSTANTS)
    assert decision.reasons["prefill"] is Reason.PROBE
    assert positions_of(state) == (0.54, 1.0)


def test_a_latency_that_grows_more_affords_less() -> None:
    seen = make_seen(100.0, ttft=make_sample(1.0, quantile_seconds=0.6))
    assert affordable_step(1.0, seen, CONSTANTS) == pytest.approx(0.5)
    assert affordable_step(2.0, seen, CONSTANTS) == pytest.approx(0.25)


def test_the_other_latency_limits_the_step_too() -> None:
    seen = make_seen(100.0, itl=make_sample(1.0, quantile_seconds=0.05))
    assert affordable_step(1.0, seen, CONSTANTS) == 0.0


def _after_a_failed_restore() -> LawState:
    state, _ = decide(make_state(0.5, 1.0), make_seen(100.0), CONSTANTS)
    assert positions_of(state) == (0.6, 1.0)
    state, decision = decide(state, make_seen(110.0, ttft=0.88), CONSTANTS)
    assert decision.reasons["prefill"] is Reason.RESTORE_TAKEN_BACK
    return state


def test_a_violation_soon_after_a_step_back_takes_it_back() -> None:
    assert positions_of(_after_a_failed_restore()) == (0.5, 1.0)


def test_the_next_step_back_waits_longer_each_time() -> None:
    state = _after_a_failed_restore()
    _, decision = decide(state, make_seen(229.0), CONSTANTS)
    assert decision.reasons["prefill"] is Reason.BACKOFF
    state, decision = decide(state, make_seen(230.0), CONSTANTS)
    assert decision.reasons["prefill"] is Reason.RESTORE
    state, _ = decide(state, make_seen(240.0, ttft=0.88), CONSTANTS)
    assert state.phases["prefill"].failures[-1].until_seconds == 240.0 + 4 * 120.0


def test_the_wait_ends_when_the_load_falls() -> None:
    state = _after_a_failed_restore()
    _, decision = decide(state, make_seen(175.0, rate_per_second=7.1), CONSTANTS)
    assert decision.reasons["prefill"] is Reason.BACKOFF
    _, decision = decide(state, make_seen(175.0, rate_per_second=6.9), CONSTANTS)
    assert decision.reasons["prefill"] is Reason.RESTORE


def test_a_burst_during_a_trial_costs_more_than_the_step_back() -> None:
    state, _ = decide(make_state(0.5, 1.0), make_seen(100.0), CONSTANTS)
    state, _ = decide(state, make_seen(110.0, ttft=0.0), CONSTANTS)
    assert positions_of(state) == (0.35, 1.0)


def test_a_step_back_that_lasted_is_no_longer_to_blame() -> None:
    state, _ = decide(make_state(0.5, 1.0), make_seen(100.0), CONSTANTS)
    state, decision = decide(state, make_seen(221.0, ttft=0.5), CONSTANTS)
    assert decision.reasons["prefill"] is Reason.TTFT_SLO


def test_the_growth_is_learned_from_a_change_under_the_same_load() -> None:
    before = make_sample(0.88, mean_seconds=0.40)
    state, _ = decide(make_state(), make_seen(100.0, ttft=before), CONSTANTS)
    step = state.phases["prefill"].step
    after = make_sample(0.95, mean_seconds=0.40 * math.exp(2.0 * step))
    state, _ = decide(state, make_seen(110.0, ttft=after), CONSTANTS)
    assert state.phases["prefill"].latency_growth == pytest.approx(1.0 + 0.3 * (2.0 - 1.0))


def test_nothing_is_learned_when_the_load_changed() -> None:
    before = make_sample(0.88, mean_seconds=0.40)
    state, _ = decide(make_state(), make_seen(100.0, ttft=before), CONSTANTS)
    after = make_sample(0.95, mean_seconds=0.1, rate_per_second=5.0)
    state, _ = decide(state, make_seen(110.0, ttft=after), CONSTANTS)
    assert state.phases["prefill"].latency_growth == 1.0
