"""A small continuous-batching server in virtual time, whose steps get shorter with the budget.

Prefill runs before decode, one request per step; a decode step gives every running request one
token. Step times grow with the budget's share of full: t = base * (1 - s + s * share).
"""

import random
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field

from sglang_alloc_controller.samples import Histogram, Reading

TTFT_EDGES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0, float("inf"))
ITL_EDGES = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.2, 0.5, float("inf"))


@dataclass
class Plant:
    """One server. Seconds throughout; `gain` scales how much the budget matters."""

    full_budget: int
    prefill_seconds: float = 0.06
    decode_base_seconds: float = 0.02
    decode_per_request_seconds: float = 0.002
    budget_share: float = 0.6
    gain: float = 1.0
    max_running: int = 16
    tokens_per_request: int = 40
    seed: int = 0
    now_seconds: float = 0.0
    prefill_budget: int = 0
    decode_budget: int = 0
    waiting: deque[float] = field(default_factory=deque)
    running: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prefill_budget = self.decode_budget = self.full_budget
        self._random = random.Random(self.seed)
        self._next_arrival_seconds = 0.0
        self._stalled_since: list[float] = []
        self.restart()

    def restart(self) -> None:
        """Lose all requests and counters, as a restarted engine does."""
        self.waiting.clear()
        self.running.clear()
        self._ttft = [0] * len(TTFT_EDGES)
        self._itl = [0] * len(ITL_EDGES)
        self._ttft_sum = self._itl_sum = 0.0
        self._token_at_seconds = self.now_seconds
        self.ttft_log: list[tuple[float, float]] = []

    def advance(self, until_seconds: float, requests_per_second: float) -> None:
        """Run to `until_seconds` under Poisson arrivals at this rate."""
        while self.now_seconds < until_seconds:
            self._arrive(requests_per_second)
            if self.waiting and len(self.running) < self.max_running:
                self._prefill()
            elif self.running:
                self._decode()
            else:
                self.now_seconds = min(until_seconds, max(self._next_arrival_seconds, 1e-9))
                self._token_at_seconds = self.now_seconds
                if self._next_arrival_seconds >= until_seconds:
                    self.now_seconds = until_seconds

    def reading(self) -> Reading:
        """Return what /metrics would say now."""
        ttft, itl = {}, {}
        if self._ttft[-1]:
            ttft["m"] = Histogram(TTFT_EDGES, tuple(map(float, self._ttft)), self._ttft_sum)
        if self._itl[-1]:
            itl["m"] = Histogram(ITL_EDGES, tuple(map(float, self._itl)), self._itl_sum)
        return Reading(
            self.now_seconds, ttft, itl, float(len(self.waiting)), float(len(self.running))
        )

    def _arrive(self, requests_per_second: float) -> None:
        while self._next_arrival_seconds <= self.now_seconds:
            if self._next_arrival_seconds > 0 and requests_per_second > 0:
                self.waiting.append(self._next_arrival_seconds)
            rate = requests_per_second or 1.0
            start = max(self._next_arrival_seconds, self.now_seconds - 1.0 / rate)
            self._next_arrival_seconds = start + self._random.expovariate(rate)

    def _prefill(self) -> None:
        arrived_seconds = self.waiting.popleft()
        self.now_seconds += self._shortened(self.prefill_seconds, self.prefill_budget)
        ttft_seconds = self.now_seconds - arrived_seconds
        self._ttft_sum += ttft_seconds
        _observe(self._ttft, TTFT_EDGES, ttft_seconds, 1)
        self.ttft_log.append((self.now_seconds, ttft_seconds))
        if not self.running:
            self._token_at_seconds = self.now_seconds
        self.running.append(self.tokens_per_request - 1)

    def _decode(self) -> None:
        base = self.decode_base_seconds + self.decode_per_request_seconds * len(self.running)
        self.now_seconds += self._shortened(base, self.decode_budget)
        # A token waits for the prefills since the last one as well.
        gap_seconds = self.now_seconds - self._token_at_seconds
        self._token_at_seconds = self.now_seconds
        self._itl_sum += gap_seconds * len(self.running)
        _observe(self._itl, ITL_EDGES, gap_seconds, len(self.running))
        self.running = [left - 1 for left in self.running if left > 1]

    def _shortened(self, full_seconds: float, budget: int) -> float:
        share = min(0.9, self.budget_share * self.gain)
        return full_seconds * (1 - share + share * budget / self.full_budget)


def _observe(counts: list[int], edges: tuple[float, ...], seconds: float, times: int) -> None:
    for index in range(bisect_left(edges, seconds), len(edges)):
        counts[index] += times
