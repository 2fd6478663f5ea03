"""Control story, after the last step: how long users got less than full quality of late. Pure."""

from collections import deque

_SLOT_SECONDS = 60.0
# A pause of the process longer than this, such as a suspended machine, is no time in service.
_GAP_SECONDS = 10.0


class QualityMinutes:
    """Time below full quality in a rolling window, kept by the minute."""

    def __init__(self) -> None:
        """Begin with an empty window."""
        # (start of the minute, seconds of it below full)
        self._slots: deque[tuple[float, float]] = deque()
        self._at_seconds: float | None = None
        self.total_seconds = 0.0

    def add(self, now_seconds: float, *, below_full: bool, window_seconds: float) -> None:
        """Count the time since the last call; `below_full` tells what was in force meanwhile."""
        passed_seconds = now_seconds - (self._at_seconds or now_seconds)
        self._at_seconds = now_seconds
        if below_full and 0 < passed_seconds <= _GAP_SECONDS:
            self.total_seconds += passed_seconds
            self._count(now_seconds, passed_seconds)
        while self._slots and self._slots[0][0] <= now_seconds - window_seconds:
            self._slots.popleft()

    def minutes(self) -> float:
        """Return the minutes below full quality within the window."""
        return sum(seconds for _, seconds in self._slots) / 60.0

    def _count(self, now_seconds: float, passed_seconds: float) -> None:
        if self._slots and now_seconds - self._slots[-1][0] < _SLOT_SECONDS:
            start_seconds, before_seconds = self._slots[-1]
            self._slots[-1] = (start_seconds, before_seconds + passed_seconds)
        else:
            self._slots.append((now_seconds, passed_seconds))
