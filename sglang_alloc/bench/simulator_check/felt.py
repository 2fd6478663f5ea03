"""Simulator check, the common ground: what one run left behind, served or simulated. Pure data."""

from __future__ import annotations

from typing import Any, NamedTuple


class Request(NamedTuple):
    """One request of the trace, as it was due."""

    phase: str
    due_second: float
    prompt_tokens: int
    output_tokens: int


class Felt(NamedTuple):
    """What one request felt, in seconds; NaN: it was not answered."""

    ttft_seconds: float
    """From the due time to the first token."""
    itl_seconds: float
    """Mean over its tokens after the first."""


class BudgetsFrom(NamedTuple):
    """Budgets in force from `second` on in busy and in calm steps, activations per token."""

    second: float
    prefill_budget: int
    decode_budget: int
    calm_prefill_budget: int
    calm_decode_budget: int


class Computed(NamedTuple):
    """What the tokens of one phase were computed with; NaN without tokens."""

    mean_budget: float
    """Activations per token, over the tokens."""
    calm_ratio: float
    """Share of the tokens in calm steps."""


class Run(NamedTuple):
    """One way through the trace; `felt` is in the order of its requests."""

    name: str
    felt: tuple[Felt, ...]
    queue: tuple[tuple[float, float], ...]
    """(second, waiting requests), about once a second."""
    budgets: tuple[BudgetsFrom, ...]
    prefill: Computed
    decode: Computed


class Served(NamedTuple):
    """Everything that a measurement leaves for any number of comparisons."""

    facts: dict[str, object]
    """Machine, versions, model and the shape of the requests."""
    requests: tuple[Request, ...]
    phases: tuple[tuple[str, float, float], ...]
    """(name, first second, last second)."""
    settings: dict[str, dict[str, Any]]
    """The controller's, by the names of the runs that it controlled."""
    max_running_requests: int
    chunk_tokens: int
    runs: tuple[Run, ...]


BY_LATENCIES, AHEAD = "by latencies", "looking ahead"
