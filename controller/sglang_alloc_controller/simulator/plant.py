"""Simulator, second step: the simulated server's costs, limits, losses and buckets. Pure data."""

import math
from dataclasses import dataclass, replace

from sglang_alloc_controller.step_times import StepTimes

# Edges of SGLang's latency histograms, ten per decade: an SLO is put on one of them.
_R10 = (1.0, 1.25, 1.6, 2.0, 2.5, 3.2, 4.0, 5.0, 6.3, 8.0)


def _edges(first_decade: int, decades: int) -> tuple[float, ...]:
    exponents = range(first_decade, first_decade + decades)
    return (*(float(f"{step}e{power}") for power in exponents for step in _R10), math.inf)


TTFT_EDGES = _edges(-2, 4)  # 10 ms to 80 s
ITL_EDGES = _edges(-3, 3)  # 1 ms to 800 ms


@dataclass(frozen=True)
class Plant:
    """One server of one model."""

    times: StepTimes
    budget_min: int
    budget_max: int
    """Smallest and full budget of the tables, activations per token over all MoE layers."""
    prefill_losses: tuple[float, ...]
    decode_losses: tuple[float, ...]
    """Predicted loss of each budget from `budget_min` on, nats per generated token: by prompt
    states made at it, and by tokens generated at it. The two add up."""
    max_running_requests: int = 16
    chunk_tokens: int = 2048
    """Prompt tokens of a prefill step at most (--chunked-prefill-size)."""
    kv_tokens: int = 65_536
    request_seconds: float = 0.0
    """HTTP, tokeniser and detokeniser: added to each TTFT."""
    ttft_edges: tuple[float, ...] = TTFT_EDGES
    itl_edges: tuple[float, ...] = ITL_EDGES

    def prefill_loss(self, budget: int) -> float:
        """Return the predicted loss of a prefill budget, nats per generated token."""
        return self.prefill_losses[budget - self.budget_min]

    def decode_loss(self, budget: int) -> float:
        """Return the predicted loss of a decode budget, nats per generated token."""
        return self.decode_losses[budget - self.budget_min]

    def loss(self, budgets: tuple[int, int]) -> float:
        """Return the predicted loss of a pair of (prefill, decode) budgets."""
        return self.prefill_loss(budgets[0]) + self.decode_loss(budgets[1])

    def with_gain(self, gain: float) -> "Plant":
        """Return the same server, whose step times the budget changes `gain` times as much."""
        return replace(self, times=self.times.scaled(gain))
