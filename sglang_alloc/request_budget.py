"""Data story, beside step 7: what a request may say about its own budget, and what it gets then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from sglang_alloc.errors import RequestBudgetError

# In `custom_params`, which SGLang carries from every endpoint to the scheduler without reading it.
PARAMETER = "sglang_alloc_budget"
FULL = "full"

# off: requests have no say. lower: they may ask for less. any: they may ask for full quality too.
RequestPolicy = Literal["off", "lower", "any"]
REQUEST_POLICIES: tuple[str, ...] = get_args(RequestPolicy)


class OwnBudget(NamedTuple):
    """A request's own budget in activations per token: full quality, or a ceiling."""

    budget: int
    protected: bool


class RequestRules(NamedTuple):
    """What this server grants: the policy, and the budgets that its table has rows for.

    Requests of `protected_priority`, or more urgent ones, get full quality without asking; None
    protects no priority. `smaller_is_urgent` is the engine's order of priorities.
    """

    policy: RequestPolicy
    budget_min: int
    budget_max: int
    protected_priority: int | None = None
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
    return OwnBudget(value, protected=False)


def _full(rules: RequestRules) -> OwnBudget:
    if rules.policy != "any":
        raise RequestBudgetError(
            f"{PARAMETER}={FULL!r} is not granted by this server, which allows lower budgets only. "
            "Leave it out."
        )
    return OwnBudget(rules.budget_max, protected=True)


def is_urgent(priority: int | None, rules: RequestRules) -> bool:
    """Return whether a request of this priority is protected."""
    if priority is None or rules.protected_priority is None:
        return False
    if rules.smaller_is_urgent:
        return priority <= rules.protected_priority
    return priority >= rules.protected_priority


def budgets_of_tokens(
    own: OwnBudgets, in_force: int, num_tokens: int
) -> npt.NDArray[np.int32] | None:
    """Return the budget of each of a forward's tokens (T,), or None where all have the same.

    A protected request's is the full one, a ceiling is obeyed where it is below the budget in
    force. Rows beyond the requests' tokens are padding. Raises RequestBudgetError when the
    requests have more tokens than the forward: then nobody knows whose tokens these are.
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
    return own.budget if own.protected else min(own.budget, in_force)
