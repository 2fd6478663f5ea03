"""Data story, step 0: the budgets that requests of each priority have at least, as they are told.

`0:12,5:30,10:full` names classes of requests from the least urgent to the most urgent one. Which
priorities are urgent is the engine's to say, so it is compared when a model is loaded.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from sglang_alloc.errors import ConfigurationError

PRIORITY_FLOORS_VARIABLE = "SGLANG_ALLOC_PRIORITY_FLOORS"
FULL = "full"


class PriorityFloor(NamedTuple):
    """Requests of `priority`, or more urgent ones, are not served below `budget`.

    budget: activations per token; None is full quality.
    """

    priority: int
    budget: int | None

    def __str__(self) -> str:
        """Return the floor as it is told."""
        return f"{self.priority}:{FULL if self.budget is None else self.budget}"


PriorityFloors = tuple[PriorityFloor, ...]


def floors_text(floors: PriorityFloors) -> str:
    """Return floors as they are told, which is the same for floors that mean the same."""
    return ",".join(str(floor) for floor in floors)


def parse_floors(text: str) -> PriorityFloors:
    """Parse `PRIORITY:BUDGET` pairs between commas, or nothing.

    Raises:
        ConfigurationError: a pair is malformed, or the priorities neither rise nor fall throughout.
    """
    if not text.strip():
        return ()
    floors = tuple(_parse_floor(pair, text) for pair in text.split(","))
    for before, after in pairwise(floors):
        if before.priority == after.priority:
            raise ConfigurationError(
                f"{PRIORITY_FLOORS_VARIABLE}={text!r} names priority {after.priority} twice: give "
                "it one floor"
            )
    rises = [before.priority < after.priority for before, after in pairwise(floors)]
    if any(rises) and not all(rises):
        raise ConfigurationError(
            f"{PRIORITY_FLOORS_VARIABLE}={text!r} goes up and down in priority: go from the least "
            "urgent to the most urgent"
        )
    return floors


def _parse_floor(pair: str, text: str) -> PriorityFloor:
    priority, _, budget = (part.strip() for part in pair.partition(":"))
    try:
        floor = PriorityFloor(int(priority), None if budget.lower() == FULL else int(budget))
    except ValueError as error:
        raise ConfigurationError(
            f"{PRIORITY_FLOORS_VARIABLE}={text!r} holds {pair!r}, which is no floor: give a "
            f"priority, a colon, and a whole number of activations per token or {FULL!r}, for "
            "example 0:12,5:30,10:full"
        ) from error
    return floor


def require_rising(floors: PriorityFloors, budget_max: int) -> None:
    """Raise ConfigurationError unless each class has a larger floor than less urgent ones."""
    for before, after in pairwise(floors):
        least = budget_max if before.budget is None else before.budget
        if (budget_max if after.budget is None else after.budget) <= least:
            raise ConfigurationError(
                f"{PRIORITY_FLOORS_VARIABLE}={floors_text(floors)!r}: the floor {after} of the "
                f"more urgent requests is not above {before}. Go from the least urgent to the most "
                f"urgent, with a larger floor each time; full quality is {budget_max}."
            )


def require_order(floors: PriorityFloors, *, smaller_is_urgent: bool) -> None:
    """Raise ConfigurationError unless floors go towards the priorities that the engine prefers."""
    if len(floors) < 2 or (floors[0].priority > floors[-1].priority) == smaller_is_urgent:
        return
    urgent = "smaller" if smaller_is_urgent else "larger"
    raise ConfigurationError(
        f"{PRIORITY_FLOORS_VARIABLE}={floors_text(floors)!r} does not go from the least urgent to "
        f"the most urgent: this server's more urgent priorities are the {urgent} ones, by SGLang's "
        "--schedule-low-priority-values-first. Set that option, or leave it out, or turn the "
        "floors around."
    )
