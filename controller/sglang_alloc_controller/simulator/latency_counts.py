"""Simulator: a latency histogram that grows while the engine runs. Pure."""

from bisect import bisect_left
from itertools import accumulate

from sglang_alloc_controller.samples import Histogram


class LatencyCounts:
    """Events by bucket since the engine's start, as SGLang counts them."""

    def __init__(self, edges: tuple[float, ...]) -> None:
        """Begin at zero; `edges` are ascending upper edges in seconds, the last is infinity."""
        self.edges = edges
        self._counts = [0] * len(edges)
        self._sum_seconds = 0.0

    def observe(self, seconds: float, times: int) -> None:
        """Count `times` events of this latency."""
        self._counts[bisect_left(self.edges, seconds)] += times
        self._sum_seconds += seconds * times

    def histogram(self) -> Histogram:
        """Return what /metrics would show."""
        counts = tuple(map(float, accumulate(self._counts)))
        return Histogram(self.edges, counts, self._sum_seconds)

    @property
    def events(self) -> int:
        """Number of events so far."""
        return sum(self._counts)

    def copy(self) -> "LatencyCounts":
        """Return a copy that counts on its own."""
        other = LatencyCounts(self.edges)
        other._counts, other._sum_seconds = list(self._counts), self._sum_seconds
        return other
