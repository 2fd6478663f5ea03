"""Control story, third step, forward: the server's own step times, reading by reading. Pure.

What the engine's ranks did between two readings is one point of each phase's line (law_gain), if
all of it was at the present levels. A decode step is compared with the bench at its mean batch.
The sizes of prefill steps are not told; since their time is a straight line in their tokens but for
chunks, a mean size does: that of one prompt, and more the busier the engine is with prefill.
"""

import math

from sglang_alloc_controller.budget_range import BudgetRange
from sglang_alloc_controller.law_capacity import Levels, step_tokens
from sglang_alloc_controller.law_gain import Gain, seen_steps, slowdown_of
from sglang_alloc_controller.law_load import Load
from sglang_alloc_controller.law_state import (
    ForwardState,
    LawConstants,
    LawState,
    Seen,
    changed_at_seconds,
)
from sglang_alloc_controller.reading_history import Newest
from sglang_alloc_controller.step_times import times_at

# Fewer decode steps in a reading are no mean.
_STEPS_MIN = 5.0
# Prompts that join another one's prefill step, on the average of a reading, if prefill is all that
# it does: 1.03 to 1.14 prompts share a step in the simulator at shares of 0.20 to 0.46.
_PROMPTS_WHILE_BUSY = 0.3
# Standard deviation of a reading's mean decode step, over the bench's, by what the bench does not
# know (contexts, clocks, neighbours); and of one prefill step, by its size.
_DECODE_ERROR, _PREFILL_ERROR = 0.05, 0.25
# A server that is so much faster or slower from one reading to the next calls for other budgets.
_ANOTHER_RATIO = 1.15


def with_step_times(
    belief: ForwardState,
    levels: tuple[Levels, Levels],
    state: LawState,
    seen: Seen,
    constants: LawConstants,
) -> ForwardState:
    """Return the belief after the steps since the reading before.

    `levels` are in force, of busy and of calm steps.
    """
    newest, load = seen.newest, belief.load
    if newest is None or load is None:
        return belief
    since_seconds = seen.reading_at_seconds - newest.seconds
    if since_seconds < changed_at_seconds(state) + constants.law.dead_time_seconds:
        return belief
    decode = _decode(belief, newest, levels, constants)
    prefill = _prefill(belief, newest, load, levels, constants)
    change = slowdown_of(prefill, decode) / slowdown_of(belief.prefill_gain, belief.decode_gain)
    if max(change, 1.0 / change) > _ANOTHER_RATIO:
        # The budgets were chosen for the server before, and late answers so far were its own.
        belief = belief._replace(server_since_seconds=seen.reading_at_seconds, pending=())
    return belief._replace(decode_gain=decode, prefill_gain=prefill)


def _bench(
    budgets: BudgetRange, size: float, belief: ForwardState, busy: int, calm: int
) -> tuple[float, float]:
    """Return the bench's time of a step at full, and over it that of steps some of which are busy.

    `size` is that of the step, `busy` and `calm` are the levels in force.
    """
    rows = budgets.step_times[busy], budgets.step_times[calm], budgets.step_times[-1]
    in_busy, in_calm, full = times_at(budgets.sizes, rows, size)
    share = belief.busy_share
    return full, (share * in_busy + (1.0 - share) * in_calm) / full


def _decode(
    belief: ForwardState, newest: Newest, levels: tuple[Levels, Levels], constants: LawConstants
) -> Gain:
    done = newest.work
    if done.steps < _STEPS_MIN:
        return belief.decode_gain
    size = done.requests / done.steps
    full, ratio = _bench(
        constants.ranges["decode"], size, belief, levels[0].decode, levels[1].decode
    )
    return seen_steps(
        belief.decode_gain,
        done.seconds / done.steps / full,
        ratio,
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
    full, ratio = _bench(budgets, tokens, belief, levels[0].prefill, levels[1].prefill)
    return seen_steps(
        belief.prefill_gain,
        done.prefill_seconds / done.prefill_tokens * tokens / full,
        ratio,
        error=_PREFILL_ERROR * math.sqrt(tokens / done.prefill_tokens),
        seconds=newest.seconds,
        memory_seconds=law.load_memory_seconds,
    )
