"""What requests may ask for, who is protected unasked, and what each token gets then."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_alloc.errors import AllocError, RequestBudgetError
from sglang_alloc.priority_floors import PriorityFloor
from sglang_alloc.request_budget import (
    PARAMETER,
    OwnBudget,
    OwnBudgets,
    RequestPolicy,
    RequestRules,
    asked_budget,
    budgets_of_tokens,
    floor_of,
    with_floor,
)

FULL = OwnBudget(12, 12)
CLASSES = (PriorityFloor(0, 4), PriorityFloor(5, 9), PriorityFloor(10, None))


def _rules(policy: RequestPolicy = "any") -> RequestRules:
    return RequestRules(policy, budget_min=3, budget_max=12)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("full", FULL), (3, OwnBudget(3, 3)), (12, OwnBudget(3, 12)), (None, None)],
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
    assert asked_budget({PARAMETER: 5}, _rules("lower")) == OwnBudget(3, 5)
    assert asked_budget({PARAMETER: "anything"}, _rules("off")) is None


@pytest.mark.parametrize(
    ("priority", "smaller_is_urgent", "expected"),
    [
        (5, False, 12),
        (9, False, 12),
        (4, False, None),
        (5, True, 12),
        (9, True, None),
        (-1, True, 12),
        (None, False, None),
    ],
)
def test_a_protected_priority_protects_the_more_urgent_too(
    priority: int | None, smaller_is_urgent: bool, expected: int | None
) -> None:
    rules = _rules()._replace(
        priority_floors=(PriorityFloor(5, None),), smaller_is_urgent=smaller_is_urgent
    )
    assert floor_of(priority, rules) == expected
    assert floor_of(priority, _rules()) is None


@pytest.mark.parametrize(
    ("priority", "expected"),
    [(-1, None), (0, 4), (4, 4), (5, 9), (9, 9), (10, 12), (2**63 - 1, 12), (None, None)],
)
def test_a_request_has_the_floor_of_the_most_urgent_class_that_it_reaches(
    priority: int | None, expected: int | None
) -> None:
    larger = _rules()._replace(priority_floors=CLASSES)
    assert floor_of(priority, larger) == expected
    mirrored = tuple(PriorityFloor(-floor.priority, floor.budget) for floor in CLASSES)
    smaller = _rules()._replace(priority_floors=mirrored, smaller_is_urgent=True)
    assert floor_of(None if priority is None else -priority, smaller) == expected


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (None, OwnBudget(9, 12)),
        (OwnBudget(3, 4), OwnBudget(9, 9)),
        (OwnBudget(3, 10), OwnBudget(9, 10)),
        (FULL, FULL),
    ],
)
def test_a_floor_holds_whatever_its_request_asks(
    own: OwnBudget | None, expected: OwnBudget
) -> None:
    rules = _rules()._replace(priority_floors=CLASSES)
    assert with_floor(own, 5, rules) == expected
    assert with_floor(own, -1, rules) == own


@pytest.mark.parametrize(("in_force", "expected"), [(3, 9), (8, 9), (9, 9), (10, 10), (12, 10)])
def test_a_budget_in_force_counts_between_floor_and_ceiling(in_force: int, expected: int) -> None:
    found = budgets_of_tokens(OwnBudgets([OwnBudget(9, 10), None], [1, 1]), in_force, 2)
    if expected == in_force:
        assert found is None
    else:
        assert found is not None
        assert found.tolist() == [expected, in_force]


def test_each_token_gets_its_requests_budget() -> None:
    own = OwnBudgets(
        [None, FULL, OwnBudget(3, 4), OwnBudget(3, 9), OwnBudget(8, 12)], [2, 1, 3, 1, 2]
    )
    found = budgets_of_tokens(own, in_force=6, num_tokens=9)
    assert found is not None
    assert found.tolist() == [6, 6, 12, 4, 4, 4, 6, 8, 8]


def test_rows_beyond_the_requests_are_padding() -> None:
    found = budgets_of_tokens(OwnBudgets([FULL], [2]), in_force=6, num_tokens=4)
    assert found is not None
    assert found.tolist() == [12, 12, 6, 6]


@pytest.mark.parametrize(
    ("own", "in_force"),
    [(FULL, 12), (OwnBudget(3, 9), 6), (OwnBudget(3, 6), 6), (OwnBudget(5, 12), 6)],
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
