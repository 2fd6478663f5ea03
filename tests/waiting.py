"""For every test: wait for a fact of another thread or process, and never for ever."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")

PATIENCE_SECONDS = 60.0
_LOOK_EVERY_SECONDS = 0.02


def wait_until(
    fact: Callable[[], Found],
    what: str,
    seconds: float = PATIENCE_SECONDS,
    explain: Callable[[], str] = str,
) -> Found:
    """Call `fact` until its answer is true, and return that answer.

    When it does not come, fail with `what` was awaited, and what `explain` says then.
    """
    deadline = time.monotonic() + seconds
    while not (found := fact()):
        assert time.monotonic() < deadline, f"not seen within {seconds:.0f} s: {what} {explain()}"
        time.sleep(_LOOK_EVERY_SECONDS)
    return found
