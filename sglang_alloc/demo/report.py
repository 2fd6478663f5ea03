"""Demo, step 5: report.json and report.html from the three runs and the measured losses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_alloc.demo import plots
from sglang_alloc.demo.calibration import ClosedLoop, RequestShape
from sglang_alloc.demo.comparison import RAISES_MAX, Comparison
from sglang_alloc.demo.heldout_loss import LevelLoss, loss_increase_error, weighted_loss
from sglang_alloc.demo.load_plan import (
    BURST_POSITION_RATIO,
    CALM_UTILISATION_RATIO,
    CARRIED_ATTAINMENT_RATIO,
    ITL_SLACK_RATIO,
    KEPT_SHARE_RATIO,
    RAISED_BURST_RATIO,
    TTFT_SLACK_RATIO,
    LoadPlan,
)
from sglang_alloc.demo.observation import RunRecord
from sglang_alloc.demo.outcome import attainment_ratio, summarise_run
from sglang_alloc.demo.page import render_page
from sglang_alloc.demo.verdict import calm_steps, drift, verdict
from sglang_alloc.server_runs import machine

SCHEMA_VERSION = 3

HELDOUT_METHOD = (
    "Held-out loss is measured through the same server after the runs: each window's prompt is "
    "prefilled at the level's prefill budget and stays in the prefix cache; its continuation is "
    "then scored on that cache at the level's decode budget. The levels stand for the pairs of "
    "budgets at which output tokens were served: that of the prefill step that ended the request's "
    "prompt, and that of the decode step that made the token, both from the server's own record of "
    "its steps. The continuation is scored in one forward, as the API cannot force given tokens "
    "through decode steps."
)


@dataclass(frozen=True)
class DemoResult:
    """Everything that the report is made of."""

    model: str
    mode: str
    shape: RequestShape
    runs: Comparison
    full_budget: int
    floor_budget: int
    max_predicted_loss: float
    full_loss: LevelLoss
    level_losses: tuple[LevelLoss, ...]
    scored_tokens: int

    @property
    def better_full(self) -> RunRecord:
        """The run at full quality that kept more requests within the SLOs, the first if equal."""
        slo, before, after = self.runs.plan.slo, self.runs.before, self.runs.after
        better = attainment_ratio(after.requests, slo) > attainment_ratio(before.requests, slo)
        return after if better else before


def build_report(result: DemoResult) -> dict[str, Any]:
    """Return the content of report.json: seconds, ratios, nats per token, activations per token.

    `full` is the better of the two runs at full quality, `full_before` and `full_after`.
    """
    slo = result.runs.plan.slo
    full_loss = _loss_of(result, (result.full_loss,))
    before = summarise_run(result.runs.before, slo) | full_loss
    after = summarise_run(result.runs.after, slo) | full_loss
    controlled = summarise_run(result.runs.controlled, slo) | _loss_of(result, result.level_losses)
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": verdict(before, after, controlled, result.max_predicted_loss),
        "full": before if result.better_full is result.runs.before else after,
        "full_before": before,
        "full_after": after,
        "controlled": controlled,
        "calm_steps": calm_steps(controlled),
        "drift": drift(before, after),
        "slo": slo._asdict() | {"itl_is": "mean inter-token latency of a request"},
        "load": _load(result),
        "model": result.model,
        "mode": result.mode,
        "full_budget": result.full_budget,
        "floor_budget": result.floor_budget,
        "max_predicted_loss": result.max_predicted_loss,
        "machine": machine.machine_facts(),
        "versions": machine.software_versions(),
        "commit": machine.source_commit(),
        "date": machine.today_utc(),
    }


def write_report(result: DemoResult, out: Path) -> dict[str, Any]:
    """Write report.json and report.html into `out`; return the report."""
    report = build_report(result)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(without_nan(report), indent=2, allow_nan=False, ensure_ascii=False)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    slo, full, controlled = result.runs.plan.slo, result.better_full, result.runs.controlled
    timeline = plots.timeline_svg(full, controlled, slo, result.full_budget)
    distribution = plots.distribution_svg(full, controlled, slo)
    page = render_page(report, timeline, distribution)
    (out / "report.html").write_text(page, encoding="utf-8")
    return report


def without_nan(value: Any) -> Any:
    """Return `value` with every NaN as None: JSON has no NaN, and a reader must see a gap."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return value


def _loss_of(result: DemoResult, levels: Sequence[LevelLoss]) -> dict[str, Any]:
    return {
        "heldout_nll": weighted_loss(levels),
        "heldout_nll_full": result.full_loss.mean,
        "heldout_nll_increase_standard_error": loss_increase_error(levels, result.full_loss),
        "heldout_scored_tokens": result.scored_tokens,
        "heldout_method": HELDOUT_METHOD,
        "heldout_levels": [
            measured.level._asdict() | {"nll": measured.mean} for measured in levels
        ],
    }


def _load(result: DemoResult) -> dict[str, Any]:
    plan, shape = result.runs.plan, result.shape
    phases = ", ".join(
        f"{phase.seconds:.0f} s {phase.name} at {phase.requests_per_second:.2f} requests/s"
        for phase in plan.phases
    )
    return {
        "sentence": (
            f"Load: {phases}; every request has {shape.prompt_bytes} prompt and "
            f"{shape.output_tokens} output tokens."
        ),
        "rule": (
            "The load is fitted to the machine before the runs. Closed-loop clients measure the "
            "capacity, twice each, and the faster counts: "
            f"{plan.full.requests_per_second:.2f} requests/s at full budget, where SGLang's own "
            "code computes the experts; "
            f"{plan.one_below.requests_per_second:.2f} one activation below it, where ours does on "
            "a CPU and spares next to none; and "
            f"{plan.floor.requests_per_second:.2f} at the floor of {result.floor_budget} "
            f"activations per token. Calm arrives at {CALM_UTILISATION_RATIO:.0%} of the full "
            f"capacity, the burst at {BURST_POSITION_RATIO:.0%} of the way from the full to the "
            "floor capacity, and no lower than where full quality's queue outgrows the TTFT SLO "
            f"after {KEPT_SHARE_RATIO:.0%} of the burst. Requests are sent at "
            "their due times whether or not earlier ones were answered, and TTFT counts from "
            f"the due time. The SLOs are {TTFT_SLACK_RATIO:g} times the median TTFT and "
            f"{ITL_SLACK_RATIO:g} times the mean inter-token latency of the closed loop at full "
            "budget, rounded up to a bucket edge of the server's histograms." + _raised(plan)
        ),
        "phases": [phase._asdict() for phase in plan.phases],
        "prompt_bytes": shape.prompt_bytes,
        "output_tokens": shape.output_tokens,
        "calibration": {
            "idle": _closed_loop(plan.idle),
            "full": _closed_loop(plan.full),
            "one_below": _closed_loop(plan.one_below),
            "floor": _closed_loop(plan.floor),
        },
        "carried_bursts": [burst._asdict() for burst in plan.carried],
    }


def _raised(plan: LoadPlan) -> str:
    rule = (
        f" A burst of which full quality keeps {CARRIED_ATTAINMENT_RATIO:.0%} or more within both "
        f"SLOs is no overload: it is raised by the same rule from what full quality served in it, "
        f"at least by {RAISED_BURST_RATIO - 1:.0%}, and tried again, up to "
        f"{RAISES_MAX} times and before any controlled run. "
    )
    if not plan.carried:
        return rule + "That was not needed here."
    tried = ", ".join(
        f"{burst.requests_per_second:.2f} requests/s ({burst.attainment_ratio:.0%} kept)"
        for burst in plan.carried
    )
    return rule + f"That was done after bursts of {tried}."


def _closed_loop(measured: ClosedLoop) -> dict[str, Any]:
    return dict(measured._asdict())
