"""Demo, step 5: the sentences that say what the controller did, from the numbers alone."""

from __future__ import annotations

import math
from typing import Any

from sglang_alloc.allocation_mode import PHASES
from sglang_alloc.demo.load_plan import BURST, CARRIED_ATTAINMENT_RATIO

# Below this difference two runs of a few hundred requests cannot be told apart.
SAME_ATTAINMENT_RATIO = 0.01
# A machine whose speed changed by more than this between the runs is called unsteady.
DRIFT_BOUND_RATIO = 0.10

Numbers = dict[str, Any]


def verdict(before: Numbers, after: Numbers, controlled: Numbers, max_loss: float) -> str:
    """Return a few honest sentences: attainment with and without, and what it cost.

    `before` and `after` are the runs at full quality around the controlled one, which is only
    credited or blamed for what lies outside both. `max_loss`, nats per token, is what the
    controller was allowed to give up.
    """
    sentences = (
        _attainment(before, after, controlled),
        _carried(before, after),
        _cost(before, controlled, max_loss),
        _errors(before, after, controlled),
    )
    return " ".join(sentence for sentence in sentences if sentence)


def drift(before: Numbers, after: Numbers) -> Numbers:
    """Return how the machine's speed changed between the runs at full quality, and a sentence.

    The speed is the requests per second served in the burst, which overloads full quality; a run
    that carried it was at least as fast as that.
    """
    first, last = (run["burst_served_requests_per_second"] for run in (before, after))
    change_ratio = last / first - 1 if first else float("nan")
    steady = abs(change_ratio) <= DRIFT_BOUND_RATIO
    return {
        "change_ratio": change_ratio,
        "bound_ratio": DRIFT_BOUND_RATIO,
        "within_bound": steady,
        "sentence": (
            f"In the burst full quality served {first:.2f} requests/s before the controlled run "
            f"and {last:.2f} after it ({change_ratio:+.1%}): by that measure the machine "
            f"{'kept its speed' if steady else 'changed its speed'}, the bound being "
            f"{DRIFT_BOUND_RATIO:.0%}. What full quality would have kept in between lies between "
            "its two figures, as long as the speed moved one way; the better one is drawn."
        ),
    }


def calm_steps(controlled: Numbers) -> Numbers:
    """Return a few sentences: what calm steps are, and what the controller gave them.

    `controlled` tells by phase which share of the tokens was in them and the mean budgets in both
    kinds of steps.
    """
    ratio, calm, busy = (
        {phase: shown(controlled[key][phase]) for phase in PHASES}
        for key, shown in (
            ("calm_tokens_ratio", _percent),
            ("mean_budget_in_calm_steps", _one_decimal),
            ("mean_budget_in_busy_steps", _one_decimal),
        )
    )
    return {
        "sentence": (
            "The server works in steps: a prefill step reads prompts, a decode step adds a token "
            "to each running answer. A step is calm if no request is left waiting for it to end, "
            "and busy otherwise. Speed matters most in busy steps, so most quality is given up "
            "there, and calm ones keep more of it. Under the controller calm steps read "
            f"{ratio['prefill']} of the prompts' tokens and wrote {ratio['decode']} of the "
            f"answers' later ones; their mean budget was {calm['prefill']} in prefill and "
            f"{calm['decode']} in decode, that of busy steps {busy['prefill']} and "
            f"{busy['decode']}."
        )
    }


def _attainment(before: Numbers, after: Numbers, controlled: Numbers) -> str:
    low, high = sorted(run["slo_attainment_ratio"] for run in (before, after))
    reached = controlled["slo_attainment_ratio"]
    figures = (
        f"to {_percent(reached)}, from {_around(before, after)} "
        f"(in the burst: to {_percent(_burst(controlled))}, from "
        f"{_percent(_burst(before))} and {_percent(_burst(after))})"
    )
    if reached > high + SAME_ATTAINMENT_RATIO:
        return f"The controller raised the share of requests within both SLOs {figures}."
    if reached < low - SAME_ATTAINMENT_RATIO:
        return f"The controller lowered the share of requests within both SLOs {figures}."
    around = f"{_around(before, after)}, {_percent(reached)} with the controller"
    if high - low > 2 * SAME_ATTAINMENT_RATIO:
        return (
            "What the controller did for the share of requests within both SLOs cannot be told, "
            f"as the machine changed its speed: {around}."
        )
    return f"The controller did not change the share of requests within both SLOs: {around}."


def _around(before: Numbers, after: Numbers) -> str:
    first, last = (_percent(run["slo_attainment_ratio"]) for run in (before, after))
    return f"{first} at full quality before it and {last} after it"


def _carried(before: Numbers, after: Numbers) -> str:
    carried = sum(_burst(run) >= CARRIED_ATTAINMENT_RATIO for run in (before, after))
    if not carried:
        return ""
    return (
        f"Full quality kept {CARRIED_ATTAINMENT_RATIO:.0%} of the burst or more in "
        f"{('one', 'both')[carried - 1]} of its runs: that is less of an overload than the demo "
        "means to show."
    )


def _cost(full: Numbers, controlled: Numbers, max_loss: float) -> str:
    if controlled["budget_changes"] == 0:
        return "It never moved the budget, so quality was full throughout."
    increase = controlled["heldout_nll"] - controlled["heldout_nll_full"]
    error = controlled["heldout_nll_increase_standard_error"]
    relative = increase / controlled["heldout_nll_full"]
    return (
        "At the budgets that its tokens were served at (on average "
        f"{controlled['mean_prefill_budget']:.1f} in prefill and "
        f"{controlled['mean_decode_budget']:.1f} in decode, of "
        f"{full['mean_decode_budget']:.0f} activations per token) the loss on held-out text "
        f"{_direction(increase, error)} by {abs(increase):.4f} ± {error:.4f} nats per token "
        f"({relative:+.2%}), {'within' if increase <= max_loss else 'beyond'} the {max_loss:.4f} "
        "that it was allowed."
    )


def _direction(increase: float, error: float) -> str:
    if abs(increase) <= 2 * error:
        return "changed, within what the sample can resolve,"
    return "rose" if increase > 0 else "fell"


def _errors(*runs: Numbers) -> str:
    errors = sum(run["errors"] for run in runs)
    if errors == 0:
        return "No request failed."
    return f"{errors} requests failed, so these figures are not to be trusted."


def _burst(run: Numbers) -> float:
    ratio: float = run["slo_attainment_ratio_by_phase"][BURST]
    return ratio


def _percent(ratio: float) -> str:
    return "-" if math.isnan(ratio) else f"{100 * ratio:.1f}%"


def _one_decimal(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"
