"""Data story, beside step 7: what a request may say about its own budget, and what it gets then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from sglang_alloc.errors import RequestBudgetError
from sglang_alloc.priority_floors import FULL, PriorityFloors

# In `custom_params`, which SGLang carries from every endpoint to the scheduler without reading it.
PARAMETER = "sglang_alloc_budget"

# off: requests have no say. lower: they may ask for less. any: they may ask for full quality too.
RequestPolicy = Literal["off", "lower", "any"]
REQUEST_POLICIES: tuple[str, ...] = get_args(RequestPolicy)


class OwnBudget(NamedTuple):
    """What a request has of its own: the budget in force, but within these bounds.

    Both in activations per token, floor <= ceiling; full quality is a floor of the full budget.
    """

    floor: int
    ceiling: int


class RequestRules(NamedTuple):
    """What this server grants: the policy, and the budgets that its table has rows for.

    `priority_floors` hold for requests that do not ask, from the least urgent to the most urgent.
    `smaller_is_urgent` is the engine's order of priorities.
    """

    policy: RequestPolicy
    budget_min: int
    budget_max: int
    priority_floors: PriorityFloors = ()
    smaller_is_urgent: bool = False


class OwnBudgets(NamedTuple):
    """Own budgets of a forward's requests, in its order, None without; and each one's tokens."""

    of_requests: Sequence[OwnBudget | None]
    num_tokens: Sequence[int]


def asked_budget(custom_params: object, rules: RequestRules) -> OwnBudget | None:
    """Return the budget that a request asks for, or None where it does not.

    Raises:
        RequestBudgetError: the value is malformed, out of range or not granted here.
    """
    if rules.policy == "off" or not isinstance(custom_params, Mapping):
        return None
    value = custom_params.get(PARAMETER)
    if value is None:
        return None
    if value == FULL:
        return _full(rules)
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestBudgetError(
            f"{PARAMETER}={value!r} is not a budget: give {FULL!r}, or a whole number of "
            f"activations per token from {rules.budget_min} to {rules.budget_max}."
        )
    if not rules.budget_min <= value <= rules.budget_max:
        raise RequestBudgetError(
            f"{PARAMETER}={value} is out of range: this model is served with "
            f"{rules.budget_min} to {rules.budget_max} activations per token."
        )
    return OwnBudget(rules.budget_min, value)


def _full(rules: RequestRules) -> OwnBudget:
    if rules.policy != "any":
        raise RequestBudgetError(
            f"{PARAMETER}={FULL!r} is not granted by this server, which allows lower budgets only. "
            "Leave it out."
        )
    return OwnBudget(rules.budget_max, rules.budget_max)


def with_floor(
    own: OwnBudget | None, priority: int | None, rules: RequestRules
) -> OwnBudget | None:
    """Return a request's own budget with its priority's floor, which holds whatever it asks."""
    floor = floor_of(priority, rules)
    if floor is None:
        return own
    if own is None:
        return OwnBudget(floor, rules.budget_max)
    return OwnBudget(max(own.floor, floor), max(own.ceiling, floor))


def floor_of(priority: int | None, rules: RequestRules) -> int | None:
    """Return the floor of requests of this priority, or None where it has none."""
    if priority is None:
        return None
    for named, budget in reversed(rules.priority_floors):
        if priority <= named if rules.smaller_is_urgent else priority >= named:
            return rules.budget_max if budget is None else budget
    return None


def budgets_of_tokens(
    own: OwnBudgets, in_force: int, num_tokens: int
) -> npt.NDArray[np.int32] | None:
    """Return the budget of each of a forward's tokens (T,), or None where all have the same.

    A floor counts where it is above the budget in force, a ceiling where it is below. Rows beyond
    the requests' tokens are padding. Raises RequestBudgetError when the requests have more tokens
    than the forward: then nobody knows whose tokens these are.
    """
    budgets = np.array([_granted(budget, in_force) for budget in own.of_requests], np.int32)
    if (budgets == in_force).all():
        return None
    of_tokens = np.repeat(budgets, own.num_tokens)
    if len(of_tokens) > num_tokens:
        raise RequestBudgetError(
            f"a forward of {num_tokens} tokens serves requests with {len(of_tokens)} tokens"
        )
    return np.pad(of_tokens, (0, num_tokens - len(of_tokens)), constant_values=in_force)


def _granted(own: OwnBudget | None, in_force: int) -> int:
    if own is None:
        return in_force
    return min(max(in_force, own.floor), own.ceiling)
