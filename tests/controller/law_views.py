"""Views and states of the control law, built by hand."""

import math
from collections.abc import Mapping
from typing import Any

from sglang_alloc_controller.budget_range import BudgetRange
from sglang_alloc_controller.law_settings import LawSettings
from sglang_alloc_controller.law_state import LawConstants, LawState, Seen, initial_state
from sglang_alloc_controller.reading_history import Sample
from sglang_alloc_controller.samples import PHASES, InputState, Phase, Slo
from sglang_alloc_controller.settings import FreshnessSettings, SloSettings

# Round numbers, without chance and smoothing, so that the tests can be computed by hand.
_BY_HAND: dict[str, Any] = {
    "confidence_sigmas": 0.0,
    "smoothing_ratio": 1.0,
    "long_window_seconds": 30.0,
    "window_max_seconds": 60.0,
    "restore_burn_ratio": 0.5,
    "severe_burn_ratio": 3.0,
    "restore_after_degrade_seconds": 60.0,
    "restore_margin_ratio": 0.9,
    "probe_seconds": 60.0,
    "backoff_seconds": 120.0,
    "backoff_factor": 4.0,
    "relief_ratio": 0.7,
    "calm_budgets": False,  # test_law_calm has its own
    "load_miss_price_nats": 0.6,
    "load_free_ratio": 0.1,
}
# 100 activations from floor to ceiling, so that positions read as per cent.
RANGE = BudgetRange(20, 120)


def make_constants(ranges: Mapping[Phase, BudgetRange] | None = None, **law: Any) -> LawConstants:
    """Constants with an objective of 0.9: one miss in ten is a burn rate of 1."""
    slo = SloSettings(ttft_seconds=1.0, itl_seconds=0.05, objective_ratio=0.9, queue_requests=4.0)
    chosen = {**_BY_HAND, **law}
    return LawConstants(
        slo,
        LawSettings(**chosen),
        FreshnessSettings(),
        ranges or {"prefill": RANGE, "decode": RANGE},
    )


def make_sample(within_ratio: float | None, **fields: float) -> Sample:
    """A full long window of 100 events, far from the SLO unless a quantile is given."""
    values = {
        "events": 100.0,
        "independent_events": 100.0,
        "mean_seconds": 0.01,
        "quantile_seconds": 0.01,
        "rate_per_second": 10.0,
        "span_seconds": 30.0,
        **fields,
    }
    return Sample(within_ratio=within_ratio, **values)


def make_seen(
    now_seconds: float,
    ttft: float | Sample | None = 1.0,
    itl: float | Sample | None = 1.0,
    queue_requests: float = 0.0,
    *,
    state: InputState = InputState.VALID,
    rate_per_second: float = 10.0,
    warming_up: bool = False,
    long_samples: dict[Slo, Sample | None] | None = None,
) -> Seen:
    """A view with these shares within the SLOs, read at this very moment."""
    given: dict[Slo, float | Sample | None] = {"ttft": ttft, "itl": itl}
    samples = {
        slo: make_sample(value) if isinstance(value, float) else value
        for slo, value in given.items()
    }
    return Seen(
        now_seconds=now_seconds,
        input_state=state,
        warming_up=warming_up,
        samples=samples,
        long_samples=samples if long_samples is None else long_samples,
        event_rates={"ttft": rate_per_second, "itl": rate_per_second},
        queue_requests=queue_requests,
        reading_at_seconds=now_seconds,
    )


def make_state(
    prefill: float = 1.0, decode: float = 1.0, constants: LawConstants | None = None
) -> LawState:
    """A fresh state at these positions."""
    law = (constants or make_constants()).law
    return initial_state({"prefill": prefill, "decode": decode}, law, -math.inf)


def positions_of(state: LawState) -> tuple[float, float]:
    """Return the positions of prefill and decode."""
    prefill, decode = (round(state.phases[phase].position, 9) for phase in PHASES)
    return prefill, decode
