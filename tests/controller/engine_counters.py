"""Counters of an engine that answers 10 requests and 100 tokens a second, in virtual time."""

from virtual_loop import VirtualController

from sglang_alloc_controller.samples import Histogram, Reading

EDGES = (0.05, 1.0, float("inf"))


class Engine:
    """What it answers within the SLOs is `within_ratio` of all."""

    def __init__(self, controller: VirtualController) -> None:
        self._clock = controller.clock
        self.within_ratio, self.queue_requests, self.running_requests = 1.0, 0.0, 1.0
        self.edges = EDGES
        self._within, self._events, self._at_seconds = 0.0, 0.0, self._clock.now_seconds

    def __call__(self) -> Reading:
        now_seconds = self._clock.now_seconds
        if self.running_requests:
            came = 10 * (now_seconds - self._at_seconds)
            self._events += came
            self._within += came * self.within_ratio
        self._at_seconds = now_seconds
        counts = (self._within, self._within, self._events)
        ttft = {"m": Histogram(self.edges, counts, 0.0)}
        itl = {"m": Histogram(self.edges, tuple(10 * count for count in counts), 0.0)}
        edges = frozenset(self.edges)
        return Reading(
            now_seconds,
            ttft,
            itl,
            self.queue_requests,
            self.running_requests,
            {"ttft": edges, "itl": edges},
        )
