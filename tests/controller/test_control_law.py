"""The control law, computed by hand: 100 activations of range, objective 0.9."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from law_views import RANGE, make_constants, make_sample, make_seen, make_state, positions_of

from sglang_alloc_controller.budget_range import BudgetRange
from sglang_alloc_controller.control_law import decide, frozen
from sglang_alloc_controller.law_state import LawConstants, Reason
from sglang_alloc_controller.samples import InputState
from sglang_alloc_controller.slo import alarm_burn, burn_ratio

CONSTANTS = make_constants()


def test_a_burn_rate_of_one_is_exactly_the_slo() -> None:
    assert burn_ratio(0.9, 0.9) == pytest.approx(1.0)
    assert burn_ratio(1.0, 0.9) == 0.0
    assert burn_ratio(0.0, 0.9) == pytest.approx(10.0)


def test_the_alarm_rises_by_the_spread_of_the_misses() -> None:
    slo, law = CONSTANTS.slo, make_constants(confidence_sigmas=2.0).law
    # sqrt(0.9 / (0.1 * 100)) = 0.3
    assert alarm_burn(100, slo, law) == pytest.approx(1.6)
    assert alarm_burn(1e9, slo, law) == pytest.approx(1.0, abs=1e-3)


def test_the_alarm_stays_below_the_clamp_so_that_few_events_can_sound_it() -> None:
    law = make_constants(confidence_sigmas=10.0).law
    assert alarm_burn(1, CONSTANTS.slo, law) == pytest.approx(0.8 * law.max_burn_ratio)


def test_a_ttft_violation_lowers_prefill_in_proportion_to_its_excess() -> None:
    # Half within: burn 5, excess 4, step 0.06 * 4 = 0.24.
    state, decision = decide(make_state(), make_seen(100.0, ttft=0.5), CONSTANTS)
    assert positions_of(state) == (0.76, 1.0)
    assert decision.reasons == {"prefill": Reason.TTFT_SLO, "decode": Reason.AT_CEILING}
    assert decision.excesses["prefill"] == pytest.approx(4.0)


def test_an_itl_violation_lowers_decode() -> None:
    state, decision = decide(make_state(), make_seen(100.0, itl=0.7), CONSTANTS)
    assert positions_of(state) == (1.0, 0.88)
    assert decision.reasons["decode"] is Reason.ITL_SLO


def test_a_step_down_is_limited_however_bad_it_is() -> None:
    state, _ = decide(make_state(), make_seen(100.0, ttft=0.0), CONSTANTS)
    assert positions_of(state) == (0.75, 1.0)


def test_a_step_down_is_at_least_one_activation() -> None:
    coarse = make_constants({"prefill": BudgetRange(4, 8), "decode": RANGE})
    state, _ = decide(make_state(), make_seen(100.0, ttft=0.85), coarse)
    assert positions_of(state) == (0.75, 1.0)


def test_the_burn_rate_is_clamped_before_it_is_smoothed() -> None:
    constants = make_constants(smoothing_ratio=0.5, severe_burn_ratio=1.5, max_burn_ratio=4.0)
    state, _ = decide(make_state(), make_seen(100.0, ttft=1.0), constants)
    state, _ = decide(state, make_seen(101.0, ttft=0.0), constants)
    # (0 + 4) / 2 = 2: excess 1, one step of 0.06. Unclamped it would have been 5 and 0.24.
    assert positions_of(state) == (0.94, 1.0)


def test_within_the_dead_band_nothing_moves() -> None:
    # 8 misses in 100: burn 0.8, between 0.5 and 1.
    state = make_state(0.5, 0.5)
    after, decision = decide(state, make_seen(100.0, ttft=0.92, itl=0.92), CONSTANTS)
    assert positions_of(after) == (0.5, 0.5)
    assert set(decision.reasons.values()) == {Reason.DEADBAND}


def test_a_second_step_down_waits_for_the_hold() -> None:
    state, _ = decide(make_state(), make_seen(100.0, ttft=0.5), CONSTANTS)
    state, decision = decide(state, make_seen(102.9, ttft=0.5), CONSTANTS)
    assert decision.reasons["prefill"] is Reason.HOLD
    state, decision = decide(state, make_seen(103.0, ttft=0.5), CONSTANTS)
    assert decision.reasons["prefill"] is Reason.TTFT_SLO
    assert positions_of(state) == (0.52, 1.0)


def test_a_mild_violation_must_show_in_a_full_long_window() -> None:
    mild, fine = make_sample(0.8), make_sample(1.0)
    young = make_sample(0.8, span_seconds=29.0)
    for longer, expected in ((fine, False), (young, False), (mild, True), (None, False)):
        seen = make_seen(100.0, ttft=mild, long_samples={"ttft": longer, "itl": fine})
        _, decision = decide(make_state(), seen, CONSTANTS)
        assert (decision.reasons["prefill"] is Reason.TTFT_SLO) is expected, longer


def test_a_severe_violation_is_acted_on_at_once() -> None:
    severe = make_sample(0.7, span_seconds=2.0)
    seen = make_seen(100.0, ttft=severe, long_samples={"ttft": severe, "itl": None})
    _, decision = decide(make_state(), seen, CONSTANTS)
    assert decision.reasons["prefill"] is Reason.TTFT_SLO


def test_a_severe_violation_that_is_over_is_no_reason_to_act() -> None:
    severe, fine = make_sample(0.5, span_seconds=10.0), make_sample(0.97)
    long_samples = {"ttft": fine, "itl": None}
    drained = make_seen(100.0, ttft=severe, long_samples=long_samples, queue_requests=2.0)
    _, decision = decide(make_state(), drained, CONSTANTS)
    assert decision.reasons["prefill"] is not Reason.TTFT_SLO
    queued = make_seen(100.0, ttft=severe, long_samples=long_samples, queue_requests=3.0)
    _, decision = decide(make_state(), queued, CONSTANTS)
    assert decision.reasons["prefill"] is Reason.TTFT_SLO


def test_too_few_samples_decide_nothing() -> None:
    few = make_sample(0.0, events=5.0)
    state = replace(make_state(0.5, 1.0))
    recent = {name: replace(phase, changed_at_seconds=90.0) for name, phase in state.phases.items()}
    _, decision = decide(replace(state, phases=recent), make_seen(100.0, ttft=few), CONSTANTS)
    assert decision.reasons["prefill"] is Reason.TOO_FEW_SAMPLES


def test_a_queue_above_its_slo_lowers_prefill_before_any_request_was_late() -> None:
    # 6 waiting where 4 are allowed: excess 0.5, step 0.03.
    state, decision = decide(make_state(), make_seen(100.0, queue_requests=6.0), CONSTANTS)
    assert positions_of(state) == (0.97, 1.0)
    assert decision.reasons["prefill"] is Reason.QUEUE_SLO


def test_a_long_queue_lowers_decode_too() -> None:
    # 12 waiting: excess 2, step 0.12 for both.
    state, decision = decide(make_state(), make_seen(100.0, queue_requests=12.0), CONSTANTS)
    assert positions_of(state) == (0.88, 0.88)
    assert set(decision.reasons.values()) == {Reason.QUEUE_SLO}


def test_a_shrinking_queue_is_waited_for() -> None:
    state, _ = decide(make_state(), make_seen(100.0, queue_requests=12.0), CONSTANTS)
    shrinking = make_seen(104.0, ttft=0.0, queue_requests=8.0)
    _, decision = decide(state, shrinking, CONSTANTS)
    assert set(decision.reasons.values()) == {Reason.DRAINING}
    _, decision = decide(state, make_seen(104.0, queue_requests=12.0), CONSTANTS)
    assert set(decision.reasons.values()) == {Reason.QUEUE_SLO}


def test_a_shrinking_queue_is_not_waited_for_for_ever() -> None:
    state, _ = decide(make_state(), make_seen(100.0, queue_requests=20.0), CONSTANTS)
    _, decision = decide(state, make_seen(110.5, queue_requests=16.0), CONSTANTS)
    assert decision.reasons["prefill"] is Reason.QUEUE_SLO


def test_a_phase_at_its_floor_passes_its_violation_on() -> None:
    state, decision = decide(make_state(0.0, 1.0), make_seen(100.0, ttft=0.5), CONSTANTS)
    assert positions_of(state) == (0.0, 0.76)
    assert decision.reasons == {"prefill": Reason.AT_FLOOR, "decode": Reason.TTFT_SLO}
    state, decision = decide(make_state(1.0, 0.0), make_seen(100.0, itl=0.5), CONSTANTS)
    assert positions_of(state) == (0.76, 0.0)
    assert decision.reasons == {"prefill": Reason.ITL_SLO, "decode": Reason.AT_FLOOR}


def test_both_at_the_floor_and_violating_is_saturated_and_then_infeasible() -> None:
    state, decision = decide(make_state(0.0, 0.0), make_seen(100.0, ttft=0.0), CONSTANTS)
    assert decision.saturation_ratio == 1.0
    assert set(decision.reasons.values()) == {Reason.AT_FLOOR}
    state, decision = decide(state, make_seen(130.0, ttft=0.0), CONSTANTS)
    assert set(decision.reasons.values()) == {Reason.INFEASIBLE}
    _, decision = decide(state, make_seen(131.0), CONSTANTS)
    assert Reason.INFEASIBLE not in decision.reasons.values()
    assert decision.saturation_ratio == 0.8


def test_saturation_contains_the_quality_deficit() -> None:
    _, decision = decide(make_state(1.0, 0.5), make_seen(100.0, itl=0.92), CONSTANTS)
    assert decision.saturation_ratio == pytest.approx(0.4)


def test_nothing_winds_up_at_the_floor() -> None:
    state = make_state(0.0, 0.0)
    for second in range(1000):
        state, _ = decide(state, make_seen(100.0 + second, ttft=0.0), CONSTANTS)
    state, _ = decide(state, make_seen(1200.0), CONSTANTS)
    assert positions_of(state) == (0.1, 0.0)


def test_an_idle_server_is_ramped_to_the_ceiling_in_the_ramp_time() -> None:
    state, times = make_state(0.0, 0.0), 0
    while positions_of(state) != (1.0, 1.0):
        seen = make_seen(100.0 + times * 0.5, None, None, state=InputState.IDLE)
        state, decision = decide(state, seen, CONSTANTS)
        assert set(decision.reasons.values()) == {Reason.IDLE}
        times += 1
    assert times * 0.5 == pytest.approx(10.0, abs=1.0)


def test_a_stale_input_is_held_for_a_while_and_then_ramped_to_full() -> None:
    state = make_state(0.3, 0.3)
    state, decision = decide(state, make_seen(100.0, state=InputState.STALE), CONSTANTS)
    assert set(decision.reasons.values()) == {Reason.STALE_HOLD}
    state, decision = decide(state, make_seen(114.9, state=InputState.STALE), CONSTANTS)
    assert positions_of(state) == (0.3, 0.3)
    state, decision = decide(state, make_seen(115.0, state=InputState.STALE), CONSTANTS)
    assert set(decision.reasons.values()) == {Reason.STALE_RAMP}
    assert positions_of(state) == (0.4, 0.4)


def test_a_stale_input_brings_the_lower_phase_back_first_and_takes_its_time() -> None:
    state, _ = decide(make_state(0.9, 0.7), make_seen(100.0, state=InputState.STALE), CONSTANTS)
    found = []
    for half_seconds in range(230, 280):
        seen = make_seen(half_seconds / 2, state=InputState.STALE)
        state, _ = decide(state, seen, CONSTANTS)
        if not found or found[-1][1] != positions_of(state):
            found.append((half_seconds / 2, positions_of(state)))
    # A tenth of the way takes a tenth of freshness.ramp_seconds, 60.
    assert found[:2] == [(115.0, (0.9, 0.8)), (121.0, (0.9, 0.9))]
    assert found[-1] == (127.0, (1.0, 1.0))


def test_a_stale_input_is_held_for_ever_when_asked_to() -> None:
    freshness = CONSTANTS.freshness.model_copy(update={"then": "hold"})
    constants = CONSTANTS._replace(freshness=freshness)
    state = make_state(0.3, 0.3)
    for now_seconds in (100.0, 1e6):
        seen = make_seen(now_seconds, state=InputState.STALE)
        state, decision = decide(state, seen, constants)
    assert positions_of(state) == (0.3, 0.3)
    assert set(decision.reasons.values()) == {Reason.STALE_HOLD}


def test_each_hiccup_has_its_own_hold() -> None:
    state, _ = decide(make_state(0.3), make_seen(100.0, state=InputState.STALE), CONSTANTS)
    state, _ = decide(state, make_seen(110.0, itl=0.92, ttft=0.92), CONSTANTS)
    _, decision = decide(state, make_seen(120.0, state=InputState.STALE), CONSTANTS)
    assert decision.reasons["prefill"] is Reason.STALE_HOLD


def test_a_warming_engine_moves_nothing() -> None:
    seen = make_seen(100.0, ttft=0.0, queue_requests=50.0, warming_up=True)
    state, decision = decide(make_state(0.5, 0.5), seen, CONSTANTS)
    assert positions_of(state) == (0.5, 0.5)
    assert set(decision.reasons.values()) == {Reason.WARMUP}


def test_an_override_freezes_positions_and_forgets_errors_and_trials() -> None:
    state, _ = decide(make_state(0.5, 1.0), make_seen(100.0), CONSTANTS)
    state = frozen(state, Reason.OVERRIDE, make_seen(105.0, ttft=0.0))
    assert positions_of(state) == (0.6, 1.0)
    assert state.phases["prefill"].burn_ratio is None
    _, decision = decide(state, make_seen(108.0, ttft=0.0), CONSTANTS)
    assert decision.reasons["prefill"] is Reason.TTFT_SLO


def test_the_same_reading_is_smoothed_only_once() -> None:
    constants = make_constants(smoothing_ratio=0.5)
    state, _ = decide(make_state(0.5), make_seen(100.0, ttft=1.0), constants)
    once = make_seen(101.0, ttft=0.92)
    state, _ = decide(state, once, constants)
    again, _ = decide(state, once._replace(now_seconds=101.5), constants)
    assert again.phases["prefill"].burn_ratio == state.phases["prefill"].burn_ratio


def test_a_latency_without_a_promise_never_asks_for_speed() -> None:
    slo = CONSTANTS.slo.model_copy(update={"itl_seconds": None})
    constants = CONSTANTS._replace(slo=slo)
    state, decision = decide(make_state(1.0, 0.5), make_seen(100.0, itl=None), constants)
    assert decision.reasons["decode"] is Reason.RESTORE
    assert positions_of(state) == (1.0, 0.6)


def test_a_range_of_one_budget_is_at_floor_and_ceiling() -> None:
    only = BudgetRange(48, 48)
    assert (only.budget(0.0), only.budget(1.0), only.position(48)) == (48, 48, 1.0)
    constants = make_constants({"prefill": only, "decode": only})
    state, decision = decide(make_state(), make_seen(100.0, ttft=0.0), constants)
    assert positions_of(state) == (1.0, 1.0)
    assert decision.saturation_ratio == 1.0


share = st.one_of(st.none(), st.floats(0, 1))


@given(
    steps=st.lists(
        st.tuples(share, share, st.floats(0, 100), st.sampled_from(InputState), st.floats(0.1, 30)),
        max_size=40,
    ),
    size=st.integers(0, 1500),
)
def test_no_history_of_inputs_leaves_the_range(
    steps: list[tuple[float | None, float | None, float, InputState, float]], size: int
) -> None:
    span = BudgetRange(20, 20 + size)
    constants: LawConstants = make_constants({"prefill": span, "decode": span})
    state, now_seconds = make_state(constants=constants), 100.0
    for ttft, itl, queue, input_state, wait_seconds in steps:
        now_seconds += wait_seconds
        seen = make_seen(now_seconds, ttft, itl, queue, state=input_state)
        before = state
        state, decision = decide(state, seen, constants)
        unknown = math.isnan(decision.saturation_ratio)
        assert unknown == (input_state is InputState.STALE)
        assert unknown or 0.0 <= decision.saturation_ratio <= 1.0
        for phase, position in decision.positions.items():
            assert 0.0 <= position <= 1.0
            fell = before.phases[phase].position - position
            assert fell <= max(0.25, span.smallest_step) + 0.5 * span.smallest_step + 1e-9
