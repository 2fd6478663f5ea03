"""Budgets for calm steps beside those for the others, computed by hand and in whole decisions."""

import math
from dataclasses import replace

import numpy as np
import pytest
from law_views import make_constants, make_seen, make_state, positions_of

from sglang_alloc.shared_table import CalmBudgets
from sglang_alloc_controller.budget_range import BudgetRange
from sglang_alloc_controller.control_core import ControlCore
from sglang_alloc_controller.control_law import decide, frozen, not_taken
from sglang_alloc_controller.law_calm import Plan, Plans, plans_of, running_limit
from sglang_alloc_controller.law_capacity import NO_CHOICES, Choice, Choices, Demand, Levels
from sglang_alloc_controller.law_settings import LawSettings
from sglang_alloc_controller.law_state import (
    Calm,
    ForwardState,
    LawState,
    Reason,
    Seen,
    calm_levels_of,
    changed_at_seconds,
    levels_of,
)
from sglang_alloc_controller.law_steps import with_step_times
from sglang_alloc_controller.load_history import LoadWindow
from sglang_alloc_controller.reading_history import Newest
from sglang_alloc_controller.samples import InputState, Phase, RankTime
from sglang_alloc_controller.settings import parse_settings

LAW = LawSettings()
FULL = Choice(Levels(1, 1), 0.0, 0.1)
HALF = Choice(Levels(0, 1), 0.02, 0.08)
DEEP = Choice(Levels(0, 0), 0.2, 0.05)
LEVELS: dict[Phase, BudgetRange] = {
    "prefill": BudgetRange(
        10, 40, (10, 40), (1.024, 2.048), (0.1, 0.0), (100.0, 2048.0), ((0.05, 1.024), (0.1, 2.048))
    ),
    "decode": BudgetRange(
        10, 40, (10, 40), (0.01, 0.02), (0.01, 0.0), (8.0, 16.0), ((0.01, 0.02), (0.02, 0.04))
    ),
}
CONSTANTS = make_constants(LEVELS, calm_budgets=True)
SETTINGS = {"table": "/t", "slo": {"ttft_seconds": 1.0, "itl_seconds": 0.05}}


def _plans(
    found: list[Choice], in_force: tuple[Choice, Choice], demand: Demand, law: LawSettings = LAW
) -> Plans:
    prefill, decode = (
        np.array(column) for column in zip(*(one.levels for one in found), strict=True)
    )
    losses, works = (
        np.array([getattr(one, name) for one in found]) for name in ("loss", "work_seconds")
    )
    return plans_of(Choices(prefill, decode, losses, works), in_force, demand, law)


def _plan(busy: Choice, calm: Choice, demand: Demand) -> Plan:
    return _plans([FULL], (busy, calm), demand).in_force


def _wanted(
    rate: float, law: LawSettings = LAW, found: tuple[Choice, ...] = (FULL, HALF, DEEP)
) -> tuple[Plan, float]:
    demand = Demand(rate)
    plans = _plans([*found], (FULL, FULL), demand, law)
    slo = CONSTANTS.slo.model_copy(update={"objective_ratio": 0.95})
    return plans.cheapest(demand, 0.85, CONSTANTS._replace(slo=slo, law=law))


def _seen(now_seconds: float, rate: float, **fields: object) -> Seen:
    arrivals = now_seconds * rate
    window = LoadWindow(now_seconds, arrivals, arrivals, 100 * arrivals, 10 * arrivals)
    view = make_seen(now_seconds)
    return view._replace(load_windows=(window,), running_requests=16.0, **fields)


def test_what_two_pairs_cost_follows_the_share_of_busy_steps() -> None:
    plan = _plan(DEEP, FULL, Demand(10.0))
    # 0.4 * 0.05 + 0.6 * 0.1 = 0.08 s of work: a utilisation of 0.8.
    share = 1 / (1 + math.exp(8.5 * 0.2))
    assert plan.busy_share == pytest.approx(share)
    assert plan.loss == pytest.approx(share * 0.2)
    assert plan.work_seconds == pytest.approx(0.6 * 0.05 + 0.4 * 0.1)
    assert (plan.levels, plan.calm) == (Levels(0, 0), Levels(1, 1))
    # 1250 / s are beyond any number that an exponential can hold.
    assert _plan(DEEP, FULL, Demand(12500.0)).busy_share == pytest.approx(1.0)
    assert _plan(DEEP, FULL, Demand(0.0)).busy_share == pytest.approx(0.0, abs=1e-3)


def test_the_same_pair_for_all_steps_costs_what_it_costs_alone() -> None:
    plan = _plan(HALF, HALF, Demand(7.0))
    assert (plan.loss, plan.work_seconds) == (HALF.loss, pytest.approx(HALF.work_seconds))


def test_a_load_that_full_quality_carries_has_no_other_pair() -> None:
    plan, gain = _wanted(6.0)
    assert (plan.levels, plan.calm) == (Levels(1, 1), Levels(1, 1))
    assert gain == pytest.approx(0.0)


def test_calm_steps_keep_their_quality_as_long_as_busy_ones_carry_the_load() -> None:
    plan, gain = _wanted(9.5)
    assert (plan.levels, plan.calm) == (Levels(0, 1), Levels(1, 1))
    assert gain > 0
    # At more load calm steps give up quality too, and never more than busy ones.
    heavy, _ = _wanted(13.0)
    assert (heavy.levels, heavy.calm) == (Levels(0, 0), Levels(0, 1))


def test_calm_steps_never_have_the_smaller_budget_of_a_phase() -> None:
    slow_decode = Choice(Levels(1, 0), 0.01, 0.09)
    for tenth in range(200):
        plan, gain = _wanted(tenth / 10, found=(FULL, slow_decode, HALF, DEEP))
        assert plan.calm.prefill >= plan.levels.prefill
        assert plan.calm.decode >= plan.levels.decode
        assert gain >= -1e-12


def test_without_other_pairs_the_plan_in_force_stays() -> None:
    plans = plans_of(NO_CHOICES, (HALF, FULL), Demand(100.0), LAW)
    assert plans.cheapest(Demand(100.0), 0.85, CONSTANTS) == (plans.in_force, 0.0)
    assert (plans.in_force.levels, plans.in_force.calm) == (HALF.levels, FULL.levels)
    # It costs what it costs among others, too.
    among = _plans([FULL, HALF, DEEP], (HALF, FULL), Demand(100.0))
    assert plans.in_force == among.in_force
    assert plans.cost_in_force(Demand(100.0), 0.85, CONSTANTS) == pytest.approx(
        among.cost_in_force(Demand(100.0), 0.85, CONSTANTS)
    )
    at_full = plans_of(NO_CHOICES, (FULL, FULL), Demand(0.1), LAW)
    assert at_full.cost_in_force(Demand(0.1), 0.85, CONSTANTS) == pytest.approx(0.0, abs=1e-4)


def test_without_calm_budgets_all_steps_have_the_same() -> None:
    plan, _ = _wanted(9.5, LAW.model_copy(update={"calm_budgets": False}))
    assert plan.levels == plan.calm


def test_the_limit_of_running_requests_is_a_share_of_the_most_seen() -> None:
    assert [running_limit(most, LAW) for most in (0.5, 8.0, 16.0, 256.0)] == [1, 7, 15, 240]


def _pair_of_pairs(rate: float = 5.8) -> tuple[LawState, CalmBudgets | None]:
    state, decision = decide(make_state(), _seen(100.0, rate), CONSTANTS)
    core = ControlCore(parse_settings(SETTINGS), LEVELS, {"prefill": 40, "decode": 40}, 0.0)
    return state, core.calm_budgets(decision)


def test_a_decision_names_the_budgets_of_calm_steps_and_when_a_step_is_calm() -> None:
    state, calm = _pair_of_pairs()
    assert positions_of(state) == (1.0, 0.0)
    assert calm == CalmBudgets(40, 40, 15)
    assert calm_levels_of(state, CONSTANTS) == Levels(1, 1)
    _, without = _pair_of_pairs(rate=2.0)
    assert without is None


def test_calm_steps_keep_at_least_the_budgets_that_all_steps_have() -> None:
    """Whoever raises the budgets, such as the ramp of an idle server, raises both."""
    state, _ = _pair_of_pairs()
    low = replace(state, calm=Calm(Levels(0, 0), 15))
    assert calm_levels_of(low, CONSTANTS) == Levels(1, 0)
    idle = make_seen(101.0, state=InputState.IDLE)
    for second in range(20):
        low, decision = decide(low, idle._replace(now_seconds=101.0 + second), CONSTANTS)
    assert positions_of(low) == (1.0, 1.0)
    assert decision.calm_positions is None


def test_a_person_s_budgets_and_a_step_that_nobody_took_leave_the_calm_ones_as_they_were() -> None:
    state, _ = _pair_of_pairs()
    assert frozen(state, Reason.OVERRIDE, _seen(101.0, 5.8)).calm == state.calm
    before = make_state()
    assert not_taken(before, state, CONSTANTS).calm is None


def test_a_change_of_calm_steps_alone_counts_as_a_change() -> None:
    """Else the next one could come with the next reading, whatever the holds say."""
    state, _ = _pair_of_pairs()
    only = replace(state, calm=Calm(Levels(1, 1), 15, changed_at_seconds=150.0))
    assert changed_at_seconds(state) == 100.0
    assert changed_at_seconds(only) == 150.0
    low = replace(state, calm=Calm(Levels(1, 0), 15))
    after, _ = decide(low, _seen(400.0, 5.8), CONSTANTS)
    assert after.calm is not None
    assert (positions_of(after), after.calm.levels) == (positions_of(low), Levels(1, 1))
    assert changed_at_seconds(after) == 400.0


def test_step_times_are_compared_with_the_mixture_of_both_pairs() -> None:
    """Half of the steps at full, half at the floor of decode: what the bench says of the two."""
    state, _ = _pair_of_pairs()
    assert state.forward is not None
    assert state.forward.load is not None
    levels = levels_of(state, CONSTANTS), calm_levels_of(state, CONSTANTS)
    belief: ForwardState = state.forward._replace(busy_share=0.5)
    done = RankTime(100.0, 100 * 0.75 * 0.04, requests=1600.0)
    view = _seen(200.0, 5.8, newest=Newest(1.0, 100.0, 0.0, done))
    learned = with_step_times(belief, levels, state, view, CONSTANTS)
    assert learned.decode_gain.factor() == pytest.approx(1.0)
    all_busy = with_step_times(belief._replace(busy_share=1.0), levels, state, view, CONSTANTS)
    assert all_busy.decode_gain.factor() < 0.9
