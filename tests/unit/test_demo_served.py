"""The budgets that requests were served at, by the steps that made their tokens."""

import math

import pytest
from demo_runs import FULL, make_record, make_run

from sglang_alloc.demo.heldout_loss import Level
from sglang_alloc.demo.levels import LEVELS_MAX, quantise
from sglang_alloc.demo.served import (
    BudgetsFrom,
    ServedBudgets,
    budget_timeline,
    mean_budget_by_second,
    served_budgets,
    summarise_steps,
)
from sglang_alloc.server_runs.errors import ServerRunError
from sglang_alloc.server_runs.served_steps import Step

# Two requests: the second waits while the first is prefilled, then both are decoded together. Their
# first tokens come when the next step is over, the one just before and the other just after that.
PAIR = (
    make_record(0, due=1.0, ttft=0.199, gaps=(0.04, 0.02)),
    make_record(1, due=1.0, ttft=0.221, gaps=(0.02, 0.02)),
)
PAIR_STEPS = (
    Step(1.00, "prefill", 20, 100, is_calm=False),
    Step(1.10, "prefill", 32, 100, is_calm=True),
    Step(1.20, "decode", 30, 2, is_calm=True),
    Step(1.22, "decode", 16, 2, is_calm=False),
)


def test_a_request_is_served_at_the_budgets_of_the_steps_that_made_its_tokens() -> None:
    first, second = served_budgets(make_run(*PAIR, steps=PAIR_STEPS))
    assert first == ServedBudgets(20, (30, 16), 100)
    assert second == ServedBudgets(32, (30, 16), 100)
    assert (first.decode_budget, first.output_tokens) == (23.0, 3)


def test_what_was_acknowledged_does_not_tell_what_a_request_got() -> None:
    run = make_run(*PAIR, steps=PAIR_STEPS, budgets=((0.0, 5, 5),))
    assert [one.prefill_budget for one in served_budgets(run)] == [20, 32]


def test_a_request_without_an_answer_has_no_budgets() -> None:
    run = make_run(make_record(0, due=1.0, ttft=None, error="timeout"))
    assert served_budgets(run) == []


def test_an_answer_that_no_recorded_step_made_is_an_error() -> None:
    run = make_run(make_record(0, due=1.0), steps=(Step(4.0, "prefill", 40, 100),))
    with pytest.raises(ServerRunError, match="no prefill step before it"):
        served_budgets(run)


def test_the_only_token_of_an_answer_has_the_budget_of_its_prefill() -> None:
    assert ServedBudgets(17, (), 100).decode_budget == 17.0


def test_steps_are_summarised_by_their_tokens() -> None:
    told = summarise_steps(PAIR_STEPS)
    assert told["calm_tokens_ratio"] == {"prefill": 0.5, "decode": 0.5}
    assert told["mean_budget_in_busy_steps"] == {"prefill": 20.0, "decode": 16.0}
    assert told["mean_budget_in_calm_steps"] == {"prefill": 32.0, "decode": 30.0}


def test_a_summary_of_no_steps_has_no_numbers() -> None:
    told = summarise_steps(())
    assert all(math.isnan(value) for by_phase in told.values() for value in by_phase.values())


def test_the_timeline_has_what_busy_and_calm_steps_obey_from_when_on() -> None:
    run = make_run(
        budgets=((-0.1, 40, 40), (2.0, 20, 30), (5.0, 36, 36)),
        calm_budgets=((-0.1, 40, 40), (2.0, 34, 37), (3.0, 34, 36), (5.0, 36, 36)),
    )
    assert budget_timeline(run, "prefill", 30.0) == [
        BudgetsFrom(0.0, 40, 40),
        BudgetsFrom(2.0, 20, 34),
        BudgetsFrom(5.0, 36, 36),
        BudgetsFrom(30.0, 36, 36),
    ]


def test_the_mean_of_a_second_is_over_its_tokens() -> None:
    steps = (
        Step(1.1, "decode", 30, 3),
        Step(1.9, "decode", 10, 1),
        Step(1.5, "prefill", 5, 99),
        Step(3.0, "decode", 12, 2),
    )
    run = make_run(steps=steps)
    assert mean_budget_by_second(run, "decode") == [(1.5, 25.0), (3.5, 12.0)]


def test_levels_keep_full_quality_apart_and_weigh_by_output_tokens() -> None:
    served = [ServedBudgets(40, (40,) * 29, 100), ServedBudgets(20, (24,) * 9, 100)]
    assert quantise(served, FULL) == [
        Level(40, 40, 0.75),
        Level(20, 24, 0.225),
        Level(20, 20, 0.025),
    ]


def test_tokens_of_calm_and_busy_steps_of_one_answer_are_levels_of_their_own() -> None:
    """Their mean, 22.5, would cost less than they do: loss bends upwards as a budget falls."""
    served = [ServedBudgets(13, (13,) * 9 + (32,) * 10, 100)]
    assert quantise(served, FULL) == [Level(13, 32, 0.5), Level(13, 13, 0.5)]


def test_many_budgets_become_few_levels_whose_weights_sum_to_one() -> None:
    served = [ServedBudgets(budget, (budget,) * 3, 100) for budget in range(14, 41)]
    levels = quantise(served, FULL)
    assert len(levels) == LEVELS_MAX
    assert levels[0] == Level(40, 40, pytest.approx(1 / 27))
    assert sum(level.weight for level in levels) == pytest.approx(1.0)
    mean = sum(level.weight * level.prefill_budget for level in levels)
    assert mean == pytest.approx(27.0, abs=0.5)


def test_rare_budgets_do_not_blur_common_ones() -> None:
    """As at an overload: nearly all tokens at four pairs, and few while budgets move."""
    common = [ServedBudgets(p, (d,) * 200, 100) for p in (13, 32) for d in (13, 32)]
    rare = [ServedBudgets(budget, (budget,), 100) for budget in range(20, 30)]
    levels = {level[:2] for level in quantise(common + rare, FULL)}
    assert {(13, 13), (13, 32), (32, 13), (32, 32)} <= levels
