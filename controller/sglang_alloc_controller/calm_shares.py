"""Control story, after the last step: which tokens the workers served in calm steps. Pure.

A step is calm if it leaves no request waiting and few are running; the others are busy. Workers
count their tokens by that in the shared table, twice a second at most. Older ones count nothing.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from sglang_alloc.shared_table import CalmTokens
from sglang_alloc_controller.samples import Phase

_WINDOW_SECONDS = 60.0
_NONE = CalmTokens()


class _Look(NamedTuple):
    """Tokens of all ranks since the first look."""

    at_seconds: float
    totals: CalmTokens


class CalmShares:
    """The counters of all ranks over the last minute."""

    def __init__(self) -> None:
        """Begin without a look."""
        self._counters: Sequence[CalmTokens] | None = None
        self._looks: deque[_Look] = deque()
        self._newest = _NONE

    def add(self, now_seconds: float, counters: Sequence[CalmTokens]) -> None:
        """Look at the counters of each rank, which fall when its server starts anew."""
        before, self._counters = self._counters, counters
        if before is None:
            self._looks.append(_Look(now_seconds, _NONE))
            return
        added = _NONE
        for earlier, now in zip(before, counters, strict=True):
            if now != earlier:
                added = _plus(added, _since(earlier, now))
        if any(added):
            self._newest = added
        totals = _plus(self._looks[-1].totals, added)
        self._looks.append(_Look(now_seconds, totals))
        while now_seconds - self._looks[0].at_seconds > _WINDOW_SECONDS:
            self._looks.popleft()

    def ratio(self, phase: Phase) -> float | None:
        """Return the share of the last minute's tokens served in calm steps; None: no tokens."""
        calm, tokens = _of_phase(self._of_window(), phase)
        return calm / tokens if tokens else None

    def was_busy(self, phase: Phase) -> bool | None:
        """Tell whether busy steps served tokens lately; None: nothing was counted for a minute.

        Lately is since the look before, or the last time at which anything was counted.
        """
        if not any(self._of_window()):
            return None
        calm, tokens = _of_phase(self._newest, phase)
        return tokens > calm

    def _of_window(self) -> CalmTokens:
        return _since(self._looks[0].totals, self._looks[-1].totals) if self._looks else _NONE


def _since(earlier: CalmTokens, now: CalmTokens) -> CalmTokens:
    if any(one < other for one, other in zip(now, earlier, strict=True)):
        return now
    return CalmTokens(*(one - other for one, other in zip(now, earlier, strict=True)))


def _plus(one: CalmTokens, other: CalmTokens) -> CalmTokens:
    return CalmTokens(*map(sum, zip(one, other, strict=True)))


def _of_phase(tokens: CalmTokens, phase: Phase) -> tuple[int, int]:
    """Return how many tokens of a phase were in calm steps, and how many there were."""
    if phase == "prefill":
        return tokens.calm_prefill, tokens.prefill
    return tokens.calm_decode, tokens.decode
