"""Control story, third step, forward: the server's own step times, reading by reading. Pure.

What the engine's ranks did between two readings is one point of each phase's line (law_gain), if
all of it was at the present levels. A decode step is compared with the bench at its mean batch.
The sizes of prefill steps are not told; since their time is a straight line in their tokens but for
chunks, a mean size does: that of one prompt, and more the busier the engine is with prefill.
"""

import math
from collections.abc import Sequence

from sglang_alloc_controller.law_capacity import Levels, step_tokens
from sglang_alloc_controller.law_gain import Gain, seen_steps
from sglang_alloc_controller.law_load import Load
from sglang_alloc_controller.law_state import (
    ForwardState,
    LawConstants,
    LawState,
    Seen,
    calm_levels_of,
    changed_at_seconds,
    levels_of,
)
from sglang_alloc_controller.reading_history import Newest

# Fewer decode steps in a reading are no mean.
_STEPS_MIN = 5.0
# Prompts that join another one's prefill step, on the average of a reading, if prefill is all that
# it does: 1.03 to 1.14 prompts share a step in the simulator at shares of 0.20 to 0.46.
_PROMPTS_WHILE_BUSY = 0.3
# Standard deviation of a reading's mean decode step, over the bench's, by what the bench does not
# know (contexts, clocks, neighbours); and of one prefill step, by its size.
_DECODE_ERROR, _PREFILL_ERROR = 0.05, 0.25


def with_step_times(
    belief: ForwardState, load: Load, state: LawState, seen: Seen, constants: LawConstants
) -> ForwardState:
    """Return the belief after the steps since the reading before."""
    newest = seen.newest
    if newest is None:
        return belief
    since_seconds = seen.reading_at_seconds - newest.seconds
    if since_seconds < changed_at_seconds(state) + constants.law.dead_time_seconds:
        return belief
    levels = levels_of(state, constants), calm_levels_of(state, constants)
    belief = belief._replace(decode_gain=_decode(belief, newest, levels, constants))
    return belief._replace(prefill_gain=_prefill(belief, newest, load, levels, constants))


def _mixed(bench: Sequence[float], belief: ForwardState, busy: int, calm: int) -> float:
    """Return what the bench says of steps of which some are busy, over full."""
    share = belief.busy_share
    return (share * bench[busy] + (1.0 - share) * bench[calm]) / bench[-1]


def _decode(
    belief: ForwardState, newest: Newest, levels: tuple[Levels, Levels], constants: LawConstants
) -> Gain:
    done = newest.work
    if done.steps < _STEPS_MIN:
        return belief.decode_gain
    bench = constants.ranges["decode"].steps_seconds(done.requests / done.steps)
    return seen_steps(
        belief.decode_gain,
        done.seconds / done.steps / bench[-1],
        _mixed(bench, belief, levels[0].decode, levels[1].decode),
        error=_DECODE_ERROR,
        seconds=newest.seconds,
        memory_seconds=constants.law.load_memory_seconds,
    )


def _prefill(
    belief: ForwardState,
    newest: Newest,
    load: Load,
    levels: tuple[Levels, Levels],
    constants: LawConstants,
) -> Gain:
    done = newest.work
    if done.prefill_tokens <= 0:
        return belief.prefill_gain
    budgets, law = constants.ranges["prefill"], constants.law
    busy = min(1.0, done.prefill_seconds / newest.seconds)
    tokens = step_tokens(load, budgets, law, 1.0 + _PROMPTS_WHILE_BUSY * busy)
    bench = budgets.steps_seconds(tokens)
    return seen_steps(
        belief.prefill_gain,
        done.prefill_seconds / done.prefill_tokens * tokens / bench[-1],
        _mixed(bench, belief, levels[0].prefill, levels[1].prefill),
        error=_PREFILL_ERROR * math.sqrt(tokens / done.prefill_tokens),
        seconds=newest.seconds,
        memory_seconds=law.load_memory_seconds,
    )
