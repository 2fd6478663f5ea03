"""What requests may ask for, who is protected unasked, and what each token gets then."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_alloc.errors import AllocError, RequestBudgetError
from sglang_alloc.request_budget import (
    PARAMETER,
    OwnBudget,
    OwnBudgets,
    RequestPolicy,
    RequestRules,
    asked_budget,
    budgets_of_tokens,
    is_urgent,
)

FULL = OwnBudget(12, protected=True)


def _rules(policy: RequestPolicy = "any") -> RequestRules:
    return RequestRules(policy, budget_min=3, budget_max=12)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("full", FULL), (3, OwnBudget(3, False)), (12, OwnBudget(12, False)), (None, None)],
)
def test_a_wish_is_full_or_a_ceiling(value: object, expected: OwnBudget | None) -> None:
    assert asked_budget({PARAMETER: value, "thinking_budget": 7}, _rules()) == expected


@pytest.mark.parametrize("custom_params", [None, {}, {"thinking_budget": 7}, "text", [1]])
def test_other_parameters_are_no_wish(custom_params: object) -> None:
    assert asked_budget(custom_params, _rules()) is None


@pytest.mark.parametrize("value", ["half", "12", 4.0, True, [4], {"budget": 4}, float("nan")])
def test_a_malformed_wish_says_what_it_may_be(value: object) -> None:
    with pytest.raises(RequestBudgetError, match="whole number of activations per token from 3"):
        asked_budget({PARAMETER: value}, _rules())


@pytest.mark.parametrize("value", [-1, 0, 2, 13])
def test_a_wish_without_a_row_names_the_range(value: int) -> None:
    with pytest.raises(RequestBudgetError, match="3 to 12 activations"):
        asked_budget({PARAMETER: value}, _rules())


def test_sglang_answers_a_refusal_as_it_answers_its_own_value_errors() -> None:
    assert issubclass(RequestBudgetError, ValueError)
    assert issubclass(RequestBudgetError, AllocError)


def test_full_quality_takes_the_operators_leave() -> None:
    with pytest.raises(RequestBudgetError, match="not granted"):
        asked_budget({PARAMETER: "full"}, _rules("lower"))
    assert asked_budget({PARAMETER: 5}, _rules("lower")) == OwnBudget(5, False)
    assert asked_budget({PARAMETER: "anything"}, _rules("off")) is None


@pytest.mark.parametrize(
    ("priority", "smaller_is_urgent", "expected"),
    [
        (5, False, True),
        (9, False, True),
        (4, False, False),
        (5, True, True),
        (9, True, False),
        (-1, True, True),
        (None, False, False),
    ],
)
def test_a_protected_priority_protects_the_more_urgent_too(
    priority: int | None, smaller_is_urgent: bool, expected: bool
) -> None:
    rules = _rules()._replace(protected_priority=5, smaller_is_urgent=smaller_is_urgent)
    assert is_urgent(priority, rules) is expected
    assert not is_urgent(priority, _rules())


def test_each_token_gets_its_requests_budget() -> None:
    own = OwnBudgets([None, FULL, OwnBudget(4, False), OwnBudget(9, False)], [2, 1, 3, 1])
    found = budgets_of_tokens(own, in_force=6, num_tokens=7)
    assert found is not None
    assert found.tolist() == [6, 6, 12, 4, 4, 4, 6]


def test_rows_beyond_the_requests_are_padding() -> None:
    found = budgets_of_tokens(OwnBudgets([FULL], [2]), in_force=6, num_tokens=4)
    assert found is not None
    assert found.tolist() == [12, 12, 6, 6]


@pytest.mark.parametrize(
    ("own", "in_force"), [(FULL, 12), (OwnBudget(9, False), 6), (OwnBudget(6, False), 6)]
)
def test_a_budget_that_changes_nothing_costs_nothing(own: OwnBudget, in_force: int) -> None:
    assert budgets_of_tokens(OwnBudgets([own, None], [1, 1]), in_force, 2) is None


def test_tokens_that_nobody_can_tell_apart_are_refused() -> None:
    with pytest.raises(RequestBudgetError, match="forward of 2 tokens"):
        budgets_of_tokens(OwnBudgets([FULL], [3]), in_force=6, num_tokens=2)


def test_budgets_are_numbers_that_index_rows() -> None:
    found = budgets_of_tokens(OwnBudgets([FULL, None], [1, 1]), 6, 2)
    assert found is not None
    assert found.dtype == np.int32
