"""What the law remembers of loads that were too much, computed by hand."""

from dataclasses import replace

import pytest
from law_views import make_constants, make_sample, make_seen, make_state

from sglang_alloc_controller.control_law import decide
from sglang_alloc_controller.law_failures import is_blocked, load_bound, with_failure
from sglang_alloc_controller.law_state import PhaseState, Reason

CONSTANTS = make_constants()


def _failed(position: float, rate: float, wait_seconds: float = 60.0) -> PhaseState:
    phase = replace(make_state(position).phases["prefill"], changed_at_seconds=-1e9)
    sample = make_sample(0.5, rate_per_second=rate)
    seen = make_seen(100.0, ttft=sample, rate_per_second=rate)
    return replace(phase, failures=with_failure(phase, seen, wait_seconds, CONSTANTS))


def test_a_failed_position_is_blocked_while_its_load_stays() -> None:
    phase = _failed(0.5, 10.0)
    assert is_blocked(phase, 0.5, make_seen(159.0), CONSTANTS)
    assert not is_blocked(phase, 0.5, make_seen(160.0), CONSTANTS)


def test_what_lies_above_a_failed_position_is_blocked_and_what_lies_well_below_is_not() -> None:
    phase = _failed(0.5, 10.0)
    assert is_blocked(phase, 0.9, make_seen(110.0), CONSTANTS)
    assert is_blocked(phase, 0.45, make_seen(110.0), CONSTANTS)
    assert not is_blocked(phase, 0.39, make_seen(110.0), CONSTANTS)


def test_a_load_that_is_surely_smaller_unblocks_at_once() -> None:
    phase = _failed(0.5, 10.0)
    assert is_blocked(phase, 0.5, make_seen(110.0, rate_per_second=7.1), CONSTANTS)
    assert not is_blocked(phase, 0.5, make_seen(110.0, rate_per_second=6.9), CONSTANTS)


def test_a_load_counts_as_smaller_only_beyond_chance() -> None:
    # 300 events in 30 s and two sigmas: (300 + 2 * 17.3 + 4) / 30 = 11.3.
    seen = make_seen(110.0, rate_per_second=10.0)
    assert load_bound(seen, make_constants(confidence_sigmas=2.0)) == pytest.approx(11.29, abs=0.01)
    assert load_bound(seen, CONSTANTS) == pytest.approx(10.0)


def test_a_position_that_fails_again_is_believed_to_fail_for_longer() -> None:
    phase = _failed(0.5, 10.0)
    again = with_failure(phase, make_seen(200.0), 60.0, CONSTANTS)
    assert [one.wait_seconds for one in again] == [4 * 60.0]
    assert again[0].until_seconds == 200.0 + 4 * 60.0


def test_the_longest_wait_is_limited() -> None:
    phase = _failed(0.5, 10.0, wait_seconds=3000.0)
    (failure,) = with_failure(phase, make_seen(200.0), 60.0, CONSTANTS)
    assert failure.wait_seconds == CONSTANTS.law.backoff_max_seconds


def test_an_overloaded_server_answers_less_than_arrives_so_the_higher_load_is_remembered() -> None:
    state, _ = decide(make_state(), make_seen(100.0, ttft=0.5, rate_per_second=8.0), CONSTANTS)
    state, _ = decide(state, make_seen(110.0, rate_per_second=14.0), CONSTANTS)
    assert state.phases["prefill"].failures[-1].rate_per_second == 14.0


def test_a_position_that_bears_a_larger_load_later_is_no_longer_blamed() -> None:
    phase = replace(_failed(0.5, 8.0), step=0.1)
    state = make_state(0.5)
    state = replace(state, phases={"prefill": phase, "decode": state.phases["decode"]})
    state, _ = decide(state, make_seen(110.0, rate_per_second=9.0), CONSTANTS)
    assert state.phases["prefill"].failures == ()


def test_a_position_that_failed_before_is_tried_once_per_trial() -> None:
    phase = replace(_failed(0.9, 10.0), changed_at_seconds=500.0, step=0.1)
    assert is_blocked(phase, 0.9, make_seen(619.0), CONSTANTS)
    assert not is_blocked(phase, 0.9, make_seen(620.0), CONSTANTS)


def test_after_a_step_down_the_phase_stays_although_a_step_up_would_not_reach_the_failure() -> None:
    state, _ = decide(make_state(), make_seen(100.0, ttft=0.5), CONSTANTS)
    _, decision = decide(state, make_seen(150.0), CONSTANTS)
    assert decision.reasons["prefill"] is Reason.BACKOFF
