"""Control story, third step: which phase goes first when both could. Pure.

A queue and a late first token want the engine's time, whichever phase gives it. With measured step
times and predicted losses for the levels of both phases, the next level down is worth

    share * (1 - seconds below / seconds now) / (loss below - loss now)

where share is the part of the engine's time that this phase takes: decode steps per second times
their length, and what is left for prefill. The larger worth goes down first and comes back last.
Without step times prefill goes first, and the lower phase comes back first.
"""

from sglang_alloc_controller.budget_range import BudgetRange
from sglang_alloc_controller.law_state import LawConstants, LawState, Seen
from sglang_alloc_controller.samples import PHASES, Phase

# Two budgets that are predicted to lose the same differ by less than this, in nats per token.
_LOSS_RESOLUTION = 1e-6


def first_down(state: LawState, seen: Seen, constants: LawConstants) -> Phase:
    """Return the phase whose next level down buys the most time per loss."""
    ranges = constants.ranges
    if not all(ranges[phase].seconds for phase in PHASES):
        return "prefill"
    decode_share = _decode_share(state, seen, constants)
    shares: dict[Phase, float] = {"prefill": 1.0 - decode_share, "decode": decode_share}

    def worth(phase: Phase) -> float:
        level = ranges[phase].level(state.phases[phase].position)
        return -1.0 if level == 0 else shares[phase] * _worth(ranges[phase], level)

    return max(PHASES, key=worth)


def restore_order(state: LawState, seen: Seen, constants: LawConstants) -> list[Phase]:
    """Return the phases in the order in which they may come back."""
    ranges = constants.ranges
    if not all(ranges[phase].seconds for phase in PHASES):
        return sorted(PHASES, key=lambda phase: state.phases[phase].position)
    decode_share = _decode_share(state, seen, constants)
    shares: dict[Phase, float] = {"prefill": 1.0 - decode_share, "decode": decode_share}

    def worth(phase: Phase) -> float:
        above = ranges[phase].level(state.phases[phase].position) + 1
        if above >= len(ranges[phase].levels):
            return float("inf")
        return shares[phase] * _worth(ranges[phase], above)

    return sorted(PHASES, key=worth)


def _worth(budgets: BudgetRange, level: int) -> float:
    """Return the share of the step time that the level below saves, per nat that it loses."""
    saved = 1.0 - budgets.seconds[level - 1] / budgets.seconds[level]
    return saved / max(_LOSS_RESOLUTION, budgets.losses[level - 1] - budgets.losses[level])


def _decode_share(state: LawState, seen: Seen, constants: LawConstants) -> float:
    sample = seen.long_samples["itl"] or seen.samples["itl"]
    if sample is None or sample.span_seconds <= 0:
        return 0.5
    budgets = constants.ranges["decode"]
    step_seconds = budgets.seconds[budgets.level(state.phases["decode"].position)]
    steps_per_second = sample.independent_events / sample.span_seconds
    return min(0.95, max(0.05, steps_per_second * step_seconds))
