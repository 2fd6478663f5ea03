"""Demo, step 5: the sentence that says what the controller did, from the numbers alone."""

from __future__ import annotations

from typing import Any

# Below this difference two runs of a few hundred requests cannot be told apart.
SAME_ATTAINMENT_RATIO = 0.01


def verdict(full: dict[str, Any], controlled: dict[str, Any], max_loss: float) -> str:
    """Return one honest sentence or two: attainment with and without, and what it cost.

    `max_loss`, nats per token, is what the controller was allowed to give up.
    """
    cost = _cost(full, controlled, max_loss)
    return f"{_attainment(full, controlled)} {cost}{_errors(full, controlled)}"


def _attainment(full: dict[str, Any], controlled: dict[str, Any]) -> str:
    before, after = full["slo_attainment_ratio"], controlled["slo_attainment_ratio"]
    figures = f"from {_percent(before)} to {_percent(after)}"
    if after > before + SAME_ATTAINMENT_RATIO:
        return f"The controller raised the share of requests within both SLOs {figures}."
    if after < before - SAME_ATTAINMENT_RATIO:
        return f"The controller lowered the share of requests within both SLOs {figures}."
    return (
        "The controller did not change the share of requests within both SLOs "
        f"({_percent(before)} without it, {_percent(after)} with it)."
    )


def _cost(full: dict[str, Any], controlled: dict[str, Any], max_loss: float) -> str:
    if controlled["budget_changes"] == 0:
        return "It never moved the budget, so quality was full throughout."
    increase = controlled["heldout_nll"] - controlled["heldout_nll_full"]
    error = controlled["heldout_nll_increase_standard_error"]
    relative = increase / controlled["heldout_nll_full"]
    return (
        f"At the budgets that it used (on average {controlled['mean_prefill_budget']:.1f} in "
        f"prefill and {controlled['mean_decode_budget']:.1f} in decode, of "
        f"{full['mean_decode_budget']:.0f} activations per token) the loss on held-out text "
        f"{_direction(increase, error)} by {abs(increase):.4f} ± {error:.4f} nats per token "
        f"({relative:+.2%}), {'within' if increase <= max_loss else 'beyond'} the {max_loss:.4f} "
        "that it was allowed."
    )


def _direction(increase: float, error: float) -> str:
    if abs(increase) <= 2 * error:
        return "changed, within what the sample can resolve,"
    return "rose" if increase > 0 else "fell"


def _errors(full: dict[str, Any], controlled: dict[str, Any]) -> str:
    errors = full["errors"] + controlled["errors"]
    if errors == 0:
        return " No request failed."
    return f" {errors} requests failed, so these figures are not to be trusted."


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.1f}%"
