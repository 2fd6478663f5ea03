"""Simulator check, the common ground: what one run left behind, served or simulated. Pure data."""

from __future__ import annotations

from typing import NamedTuple


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
    """Budgets in force from `second` on, activations per token."""

    second: float
    prefill_budget: int
    decode_budget: int


class Run(NamedTuple):
    """One way through the trace; `felt` is in the order of its requests."""

    name: str
    felt: tuple[Felt, ...]
    queue: tuple[tuple[float, float], ...]
    """(second, waiting requests), about once a second."""
    budgets: tuple[BudgetsFrom, ...]


class Served(NamedTuple):
    """Everything that a measurement leaves for any number of comparisons."""

    facts: dict[str, object]
    """Machine, versions, model and the shape of the requests."""
    requests: tuple[Request, ...]
    phases: tuple[tuple[str, float, float], ...]
    """(name, first second, last second)."""
    settings: dict[str, object]
    """The controller's, for the run named CONTROLLED."""
    max_running_requests: int
    chunk_tokens: int
    runs: tuple[Run, ...]


CONTROLLED = "controlled"
