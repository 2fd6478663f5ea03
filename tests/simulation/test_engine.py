"""The event core, computed by hand: 1 ms per prompt token, 10 ms per decode step at full budget."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_worlds import FLOOR, FULL, make_plant, make_workload

from sglang_alloc.errors import ConfigurationError
from sglang_alloc.shared_table import CalmBudgets
from sglang_alloc_controller.samples import RankTime
from sglang_alloc_controller.simulator.engine import Engine, Obeyed, Outcome
from sglang_alloc_controller.simulator.plant import Plant
from sglang_alloc_controller.simulator.workload import Workload

AT_FULL = (FULL, FULL)


def _run(workload: Workload, plant: Plant, budgets: tuple[int, int] = AT_FULL) -> Engine:
    engine = Engine(workload, plant, budgets)
    while not engine.done:
        engine.advance(engine.now_seconds + 0.5)
    return engine


def _by_request(engine: Engine) -> dict[int, Outcome]:
    return {outcome.request: outcome for outcome in engine.outcomes}


def test_one_request_takes_its_prefill_and_then_a_step_per_token() -> None:
    engine = _run(make_workload((1.0, 100, 5)), make_plant())
    (outcome,) = engine.outcomes
    assert outcome.ttft_seconds == pytest.approx(0.1)
    assert outcome.itl_seconds == pytest.approx(0.01)
    assert outcome.finished_seconds == pytest.approx(1.0 + 0.1 + 4 * 0.01)
    assert engine.generated_tokens == 5
    assert engine.loss_sum == 0.0


def test_the_engine_tells_its_steps_and_their_time() -> None:
    engine = Engine(make_workload((0.0, 100, 5), (0.0, 100, 5)), make_plant(), (FLOOR, FULL))
    ahead = engine.clone()
    ahead.advance(5.0)
    assert ahead.work == pytest.approx(
        RankTime(4.0, 4 * 0.01, requests=8.0, prefill_tokens=200.0, prefill_seconds=0.1)
    )
    assert engine.work == RankTime()
    ahead.restart(6.0)
    assert ahead.work == RankTime()


def test_a_smaller_budget_is_faster_and_costs_its_predicted_loss() -> None:
    engine = _run(make_workload((0.0, 100, 5)), make_plant(), (FLOOR, FLOOR))
    (outcome,) = engine.outcomes
    assert outcome.ttft_seconds == pytest.approx(0.05)
    assert outcome.itl_seconds == pytest.approx(0.005)
    # Prefill's nat weighs on all 5 tokens, decode's two on the 4 that a decode step made.
    assert engine.loss_sum == pytest.approx(5 * 1.0 + 4 * 2.0)


def test_time_spent_on_http_adds_to_the_time_to_first_token() -> None:
    (outcome,) = _run(make_workload((0.0, 100, 1)), make_plant(request_seconds=0.02)).outcomes
    assert outcome.ttft_seconds == pytest.approx(0.12)


def test_a_prompt_longer_than_a_chunk_is_prefilled_in_pieces_before_any_decode() -> None:
    engine = _run(make_workload((0.0, 100, 40), (0.11, 500, 1)), make_plant())
    short, long = _by_request(engine)[0], _by_request(engine)[1]
    # The long one waits for the decode step that began at 0.11, then takes 0.2 + 0.2 + 0.1.
    assert long.ttft_seconds == pytest.approx(0.5, abs=0.0101)
    assert short.finished_seconds == pytest.approx(0.1 + 39 * 0.01 + 0.5)


def test_prompts_that_fit_share_a_step_and_the_last_is_cut() -> None:
    engine = _run(make_workload((0.0, 150, 1), (0.0, 100, 1)), make_plant())
    # 150 + 50 tokens in the first step, the other 50 in the second, at least 20 % of 100 tokens.
    assert _by_request(engine)[0].ttft_seconds == pytest.approx(0.2)
    assert _by_request(engine)[1].ttft_seconds == pytest.approx(0.25)


def test_no_more_requests_run_than_allowed() -> None:
    plant = make_plant(max_running_requests=1)
    engine = _run(make_workload((0.0, 100, 11), (0.0, 100, 1)), plant)
    assert _by_request(engine)[1].ttft_seconds == pytest.approx(0.1 + 10 * 0.01 + 0.1)


def test_a_request_waits_for_kv_memory() -> None:
    plant = make_plant(kv_tokens=150)
    engine = _run(make_workload((0.0, 100, 11), (0.0, 100, 1)), plant)
    assert _by_request(engine)[1].ttft_seconds == pytest.approx(0.1 + 10 * 0.01 + 0.1)


def test_a_request_that_never_fits_into_kv_memory_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"151 tokens.*memory for 150"):
        Engine(make_workload((0.0, 10, 1), (0.0, 100, 51)), make_plant(kv_tokens=150), AT_FULL)


def test_an_arrival_starts_at_the_next_step_boundary() -> None:
    engine = _run(make_workload((0.0, 100, 40), (0.125, 100, 1)), make_plant())
    # Decode steps begin at 0.10, 0.11, 0.12: the one at 0.12 ends at 0.13.
    assert _by_request(engine)[1].ttft_seconds == pytest.approx(0.005 + 0.1)


def test_the_token_gap_of_a_running_request_holds_the_prefill_of_another() -> None:
    engine = _run(make_workload((0.0, 100, 3), (0.105, 100, 1)), make_plant())
    histogram = engine.itl.histogram()
    # One gap of 10 ms, one of 10 + 100 ms.
    assert histogram.counts[-1] == 2
    assert histogram.sum_seconds == pytest.approx(0.01 + 0.11)


def test_a_budget_is_in_force_from_the_next_step_on() -> None:
    engine = Engine(make_workload((0.0, 200, 1)), make_plant(), AT_FULL)
    engine.advance(0.1)
    engine.set_budgets(FLOOR, FLOOR)
    engine.advance(1.0)
    assert engine.outcomes[0].ttft_seconds == pytest.approx(0.2)
    assert engine.loss_sum == 0.0


def test_a_decode_step_under_way_is_charged_at_the_budget_it_began_with() -> None:
    engine = Engine(make_workload((0.0, 100, 2)), make_plant(), AT_FULL)
    engine.advance(0.105)
    engine.set_budgets(FLOOR, FLOOR)
    engine.advance(1.0)
    assert engine.outcomes[0].itl_seconds == pytest.approx(0.01)
    assert engine.loss_sum == 0.0


def test_a_step_that_has_not_ended_shows_in_no_counter() -> None:
    engine = Engine(make_workload((0.0, 200, 2)), make_plant(), AT_FULL)
    engine.advance(0.19)
    assert engine.ttft.events == 0
    assert engine.running_requests == 1
    engine.advance(0.2)
    assert engine.ttft.events == 1


def test_looks_in_between_change_nothing() -> None:
    workload = make_workload(*((0.03 * i, 60 + 7 * (i % 9), 1 + i % 13) for i in range(60)))
    seldom, often = Engine(workload, make_plant(), AT_FULL), Engine(workload, make_plant(), AT_FULL)
    seldom.advance(1000.0)
    for tick in range(4000):
        often.advance(tick * 0.25)
    assert len(often.outcomes) == len(seldom.outcomes) == 60
    for one, other in zip(seldom.outcomes, often.outcomes, strict=True):
        assert tuple(one) == pytest.approx(tuple(other))


def test_a_copy_goes_its_own_way() -> None:
    workload = make_workload((0.0, 100, 30), (0.05, 100, 30))
    engine = Engine(workload, make_plant(), AT_FULL)
    engine.advance(0.3)
    ahead = engine.clone()
    ahead.set_budgets(FLOOR, FLOOR)
    ahead.advance(10.0)
    assert ahead.done
    assert engine.outcomes == []
    assert engine.running_requests == 2
    engine.advance(10.0)
    assert engine.outcomes[-1].finished_seconds > ahead.outcomes[-1].finished_seconds


def test_a_restart_loses_what_is_there_and_what_comes_while_it_is_away() -> None:
    workload = make_workload((0.0, 100, 90), (0.3, 100, 2), (0.8, 100, 2), (2.0, 100, 2))
    engine = Engine(workload, make_plant(), AT_FULL)
    engine.advance(0.5)
    engine.restart(1.5)
    engine.advance(5.0)
    lost = {outcome.request for outcome in engine.outcomes if outcome.lost}
    assert lost == {0, 2}
    assert engine.done
    assert engine.ttft.events == 1
    assert _by_request(engine)[3].ttft_seconds == pytest.approx(0.1)


def test_requests_that_wait_too_long_are_counted_before_they_are_answered() -> None:
    engine = Engine(
        make_workload((0.0, 200, 50), (0.0, 200, 5), (0.2, 200, 5)), make_plant(), AT_FULL
    )
    engine.advance(0.35)
    assert engine.waiting_requests == 1
    assert engine.late_requests(0.1) == 1
    assert engine.late_requests(0.2) == 0


requests = st.lists(
    st.tuples(st.floats(0, 3), st.integers(1, 700), st.integers(1, 30)), min_size=1, max_size=40
)


@settings(max_examples=60, deadline=None)
@given(
    requests=requests,
    running=st.integers(1, 6),
    chunk=st.integers(50, 400),
    pauses=st.lists(st.floats(0.01, 0.7), min_size=1, max_size=8),
    restart=st.booleans(),
)
def test_no_request_is_lost_or_answered_twice_and_every_token_is_counted(
    requests: list[tuple[float, int, int]],
    running: int,
    chunk: int,
    pauses: list[float],
    restart: bool,
) -> None:
    workload = make_workload(*sorted(requests))
    plant = make_plant(max_running_requests=running, chunk_tokens=chunk, kv_tokens=800)
    engine, tick = Engine(workload, plant, AT_FULL), 0
    while not engine.done:
        engine.set_budgets(FLOOR + tick % 6, FULL - tick % 6)
        engine.advance(engine.now_seconds + pauses[tick % len(pauses)])
        assert engine.running_requests <= running + 1  # one more may be cut
        if restart and tick == 3:
            engine.restart(engine.now_seconds + 0.5)
        tick += 1
    assert sorted(outcome.request for outcome in engine.outcomes) == list(range(len(requests)))
    assert engine.running_requests == engine.waiting_requests == 0
    assert engine.lost_requests == sum(outcome.lost for outcome in engine.outcomes)
    answered = [one for one in engine.outcomes if not one.lost]
    for outcome in answered:
        arrival = workload.arrival_seconds[outcome.request]
        assert outcome.ttft_seconds > 0
        assert outcome.finished_seconds >= arrival + outcome.ttft_seconds - 1e-9
    if not restart:
        assert engine.generated_tokens == sum(workload.output_tokens)
        assert engine.ttft.events == len(requests)
        assert engine.itl.events == sum(tokens - 1 for tokens in workload.output_tokens)
        assert math.isfinite(engine.loss_sum)
        assert 0 <= engine.loss_sum <= 3.0 * engine.generated_tokens


def test_steps_that_leave_nobody_waiting_have_the_calm_budgets() -> None:
    """Two prompts of 150 do not share a step of 200 tokens: the first one is cut."""
    engine = Engine(
        make_workload((0.0, 150, 3), (0.0, 150, 3), (0.0, 150, 3)), make_plant(), AT_FULL
    )
    engine.set_budgets(FLOOR, FLOOR, CalmBudgets(FULL, FULL))
    while not engine.done:
        engine.advance(engine.now_seconds + 0.5)
    # 200 tokens while one waits; the other 250 (the rest of two prompts and the third) are calm.
    # Busy, at half a millisecond a token: 0.1 s. Calm: 0.2 s and 0.05 s.
    assert max(one.ttft_seconds for one in engine.outcomes) == pytest.approx(0.1 + 0.2 + 0.05)
    # Prefill's nat weighs on the answers by the share of their prompts: all of one, a third of
    # another. Decode is calm.
    assert engine.loss_sum == pytest.approx(3 * 1.0 + 3 * 50 / 150)
    prefill, decode = engine.obeyed
    assert prefill == Obeyed(450, 200 * FLOOR + 250 * FULL, 250)
    assert prefill.mean_budget == pytest.approx((200 * FLOOR + 250 * FULL) / 450)
    assert prefill.calm_ratio == pytest.approx(250 / 450)
    assert decode == Obeyed(6, 6 * FULL, 6)


def test_what_tokens_were_computed_with_is_counted_apart_in_a_clone() -> None:
    engine = Engine(make_workload((0.0, 100, 5)), make_plant(), (FULL, FLOOR))
    ahead = engine.clone()
    ahead.advance(5.0)
    # Nobody waited, so the steps are calm: with one pair of budgets that changes nothing.
    assert ahead.obeyed == (Obeyed(100, 100 * FULL, 100), Obeyed(4, 4 * FLOOR, 4))
    assert engine.obeyed == (Obeyed(), Obeyed())
    assert math.isnan(engine.obeyed[0].mean_budget)
    assert math.isnan(engine.obeyed[0].calm_ratio)


def test_steps_of_many_running_requests_are_not_calm() -> None:
    requests = [(0.0, 50, 3)] * 3
    few, many = (Engine(make_workload(*requests), make_plant(), AT_FULL) for _ in range(2))
    few.set_budgets(FLOOR, FLOOR, CalmBudgets(FULL, FULL, 4))
    many.set_budgets(FLOOR, FLOOR, CalmBudgets(FULL, FULL, 3))
    for engine in (few, many):
        while not engine.done:
            engine.advance(engine.now_seconds + 0.5)
    assert few.loss_sum == 0.0
    assert many.loss_sum == pytest.approx(2.0 * 3 * 2)  # two decode steps of three requests
    assert _by_request(few)[0].itl_seconds == pytest.approx(0.01)
    assert _by_request(many)[0].itl_seconds == pytest.approx(0.005)


def test_a_request_that_comes_ends_the_calm_at_the_next_step() -> None:
    """The one running slot is taken: what comes after 25 ms waits, and decode steps are busy."""
    plant = make_plant(max_running_requests=1)
    engine = Engine(make_workload((0.0, 100, 11), (0.125, 100, 1)), plant, AT_FULL)
    engine.set_budgets(FULL, FLOOR, CalmBudgets(FULL, FULL))
    while not engine.done:
        engine.advance(engine.now_seconds + 0.5)
    # Three calm steps of 10 ms from 0.1 s on, then seven of 5 ms.
    assert _by_request(engine)[0].finished_seconds == pytest.approx(0.1 + 3 * 0.01 + 7 * 0.005)
    assert engine.loss_sum == pytest.approx(7 * 2.0)
