"""Control story, third step: a move, and what the next samples teach about its cost. Pure."""

import math
from dataclasses import replace

from sglang_alloc_controller.law_state import LawConstants, LawState, PhaseState, Seen
from sglang_alloc_controller.reading_history import Sample
from sglang_alloc_controller.samples import SLO_OF_PHASE, Phase

# The learned growth is kept within what MoE layers can do to a step: from next to nothing to
# latency dominated by the experts in a queue.
_GROWTH_BOUNDS = (0.2, 4.0)
# A change teaches the growth only if the load stayed the same within this factor, and moves the
# estimate by this share, for one window is noisy.
_SAME_LOAD_FACTOR = 1.25
_LEARNING_RATIO = 0.3


def moved(
    phase: Phase, state: LawState, position: float, seen: Seen, constants: LawConstants
) -> PhaseState:
    """Return the phase's state after a move to `position`; its samples start anew."""
    old = state.phases[phase]
    new_position = constants.ranges[phase].snapped(position)
    return replace(
        old,
        position=new_position,
        step=new_position - old.position,
        changed_at_seconds=seen.now_seconds,
        queue_at_change=state.queue_requests or 0.0,
        burn_ratio=None,
        before_change=seen.samples[SLO_OF_PHASE[phase]],
    )


def learned(phase: Phase, state: LawState, seen: Seen, constants: LawConstants) -> PhaseState:
    """Compare the mean latency after the last change with the one before it.

    growth = ln(mean after / mean before) / step, clamped, then smoothed into the estimate.
    """
    old = state.phases[phase]
    before, after = old.before_change, seen.samples[SLO_OF_PHASE[phase]]
    if before is None or after is None or after.events < constants.law.min_samples:
        return old
    if after.span_seconds < constants.law.window_seconds / 2:
        return old
    forgotten = replace(old, before_change=None)
    if before.events < constants.law.min_samples or not _same_load(before, after):
        return forgotten
    if old.step == 0 or min(before.mean_seconds, after.mean_seconds) <= 0:
        return forgotten
    found = math.log(after.mean_seconds / before.mean_seconds) / old.step
    growth = min(_GROWTH_BOUNDS[1], max(_GROWTH_BOUNDS[0], found))
    latency_growth = old.latency_growth + _LEARNING_RATIO * (growth - old.latency_growth)
    return replace(forgotten, latency_growth=latency_growth)


def _same_load(before: Sample, after: Sample) -> bool:
    ratio = after.rate_per_second / before.rate_per_second
    return 1 / _SAME_LOAD_FACTOR <= ratio <= _SAME_LOAD_FACTOR
