"""The dashboard's content: what an operator asks, row by row, and the queries that answer it.

SGLang's own signals are read through the recording rules (deploy/prometheus), which give them one
spelling for every version of Prometheus.
"""

from __future__ import annotations

from panel_spec import PanelSpec, Query, RowSpec

TARGET = 'job=~"$job", instance=~"$instance"'
CONTROLLER = "sglang_alloc_controller"
SERVICE = 'job=~"$job"'  # per service: the replicas are summed, so there is no instance


def _budget_panel(phase: str) -> PanelSpec:
    selector = f'{TARGET}, phase="{phase}"'
    return PanelSpec(
        title=f"{phase.capitalize()} budget",
        description="Routed-expert activations per token, summed over the MoE layers: what the "
        "controller asks for, what it wrote, what the workers have in force, what calm steps obey "
        "(nobody waits, few requests run), and the bounds.",
        unit="short",
        stepped=True,
        queries=(
            Query(f"{CONTROLLER}_budget_desired_activations{{{selector}}}", "desired"),
            Query(f"{CONTROLLER}_budget_written_activations{{{selector}}}", "written"),
            Query(f"{CONTROLLER}_budget_acknowledged_activations{{{selector}}}", "acknowledged"),
            Query(f"sglang_alloc_budget_activations{{{selector}}}", "in force, rank {{tp_rank}}"),
            Query(f"{CONTROLLER}_calm_budget_written_activations{{{selector}}}", "calm steps"),
            Query(f"{CONTROLLER}_budget_floor_activations{{{selector}}}", "floor"),
            Query(f"{CONTROLLER}_budget_ceiling_activations{{{selector}}}", "ceiling"),
        ),
    )


SLOS = RowSpec(
    "SLOs",
    (
        PanelSpec(
            title="Events within the SLO, 5 minutes",
            description="Share of first tokens and of token gaps at or under their SLO, from "
            "SGLang's histograms, beside the objective.",
            unit="percentunit",
            queries=(
                Query(f"1 - sglang_alloc:slo_errors:ratio_rate5m{{{SERVICE}}}", "{{slo}}"),
                Query("sglang_alloc:slo_objective_ratio", "objective {{slo}}"),
            ),
        ),
        PanelSpec(
            title="Time to first token, p95",
            description="Interpolated inside a histogram bucket; streaming requests only.",
            unit="s",
            queries=(
                Query(
                    f"sglang_alloc:time_to_first_token_seconds:p95_5m{{{TARGET}}}", "{{instance}}"
                ),
            ),
        ),
        PanelSpec(
            title="Inter-token latency, p95",
            description="Interpolated inside a histogram bucket.",
            unit="s",
            queries=(
                Query(
                    f"sglang_alloc:inter_token_latency_seconds:p95_5m{{{TARGET}}}", "{{instance}}"
                ),
            ),
        ),
    ),
)

LOAD = RowSpec(
    "Load",
    (
        PanelSpec(
            title="Requests waiting",
            description="Requests in SGLang's queue.",
            unit="short",
            queries=(Query(f"sglang_alloc:queue_requests{{{TARGET}}}", "{{instance}}"),),
        ),
        PanelSpec(
            title="Requests running",
            description="Requests in SGLang's running batch.",
            unit="short",
            queries=(Query(f"sglang_alloc:running_requests{{{TARGET}}}", "{{instance}}"),),
        ),
        PanelSpec(
            title="Generated tokens per second",
            description="Rate over 5 minutes.",
            unit="short",
            queries=(Query(f"sglang_alloc:generated_tokens:rate5m{{{TARGET}}}", "{{instance}}"),),
        ),
    ),
)

BUDGET = RowSpec(
    "Budget",
    (
        _budget_panel("prefill"),
        _budget_panel("decode"),
        PanelSpec(
            title="Predicted quality loss",
            description="What the budget tables predict, in nats per token above the full model: "
            "expected for the tokens of the last minute, and for those of busy and of calm steps.",
            unit="short",
            stepped=True,
            queries=(
                Query(f"{CONTROLLER}_expected_loss_nats{{{TARGET}}}", "{{phase}}, expected"),
                Query(f"{CONTROLLER}_predicted_loss_nats{{{TARGET}}}", "{{phase}}, busy steps"),
                Query(
                    f"{CONTROLLER}_calm_predicted_loss_nats{{{TARGET}}}", "{{phase}}, calm steps"
                ),
            ),
        ),
        PanelSpec(
            title="Tokens served in calm steps",
            description="Share of the last minute's tokens: at the calm budgets, where there are "
            "any. The others were served while requests waited or many ran.",
            unit="percentunit",
            queries=(Query(f"{CONTROLLER}_calm_tokens_ratio{{{TARGET}}}", "{{phase}}"),),
        ),
        PanelSpec(
            title="Time below full quality",
            description="Share of the last 6 hours and of the last day in which somebody was "
            "served below a phase's ceiling, and the share that is allowed.",
            unit="percentunit",
            queries=(
                Query(f"sglang_alloc:below_full:ratio6h{{{TARGET}}}", "6 hours, {{instance}}"),
                Query(f"sglang_alloc:below_full:ratio1d{{{TARGET}}}", "1 day, {{instance}}"),
                Query("1 - sglang_alloc:quality_objective_ratio", "allowed"),
            ),
        ),
        PanelSpec(
            title="Budget changes per minute",
            description="Ups and downs; a steady load should need a handful an hour.",
            unit="short",
            queries=(
                Query(
                    f"60 * rate({CONTROLLER}_budget_changes_total{{{TARGET}}}[$__rate_interval])",
                    "{{phase}} {{direction}}",
                ),
                Query(
                    f"60 * rate({CONTROLLER}_calm_budget_changes_total{{{TARGET}}}"
                    "[$__rate_interval])",
                    "{{phase}} {{direction}}, calm steps",
                ),
            ),
        ),
    ),
)

WORKER = RowSpec(
    "Worker",
    (
        PanelSpec(
            title="Measured activations per token",
            description="What the MoE layers really computed, sampled.",
            unit="short",
            width=6,
            queries=(
                Query(
                    f"sglang_alloc_activations_per_token{{{TARGET}}}",
                    "{{phase}}, rank {{tp_rank}}",
                ),
            ),
        ),
        PanelSpec(
            title="Router mass kept",
            description="Share of the router's weight that stayed with a computed expert.",
            unit="percentunit",
            width=6,
            queries=(
                Query(f"sglang_alloc_kept_mass_ratio{{{TARGET}}}", "{{phase}}, rank {{tp_rank}}"),
            ),
        ),
        PanelSpec(
            title="Distinct experts per decode step",
            description="Mean per MoE layer: the expert weights that a decode step has to read.",
            unit="short",
            width=6,
            queries=(
                Query(f"sglang_alloc_distinct_experts_per_step{{{TARGET}}}", "rank {{tp_rank}}"),
            ),
        ),
        PanelSpec(
            title="Whose budget is in force",
            description="1 for the source that each rank follows; the fallback means that it "
            "hears no controller.",
            unit="short",
            stepped=True,
            width=6,
            queries=(
                Query(f"sglang_alloc_selection_source{{{TARGET}}}", "{{source}}, rank {{tp_rank}}"),
                Query(f"sglang_alloc_fallbacks_total{{{TARGET}}}", "fallbacks, rank {{tp_rank}}"),
            ),
        ),
    ),
)

CONTROLLER_ROW = RowSpec(
    "Controller",
    (
        PanelSpec(
            title="Burn rate that it reacts to",
            description="Smoothed misses over allowed misses: above 1 it gives up quality.",
            unit="short",
            width=6,
            queries=(Query(f"{CONTROLLER}_burn_ratio{{{TARGET}}}", "{{slo}}"),),
        ),
        PanelSpec(
            title="Input state",
            description="1 for what the readings are worth: valid, idle or stale.",
            unit="short",
            stepped=True,
            width=6,
            queries=(Query(f"{CONTROLLER}_input_state{{{TARGET}}}", "{{state}}"),),
        ),
        PanelSpec(
            title="Reason of the budget",
            description="Why each phase's budget is what it is; docs/runbook.md explains each.",
            unit="short",
            stepped=True,
            width=6,
            queries=(Query(f"{CONTROLLER}_reason{{{TARGET}}} == 1", "{{phase}}: {{reason}}"),),
        ),
        PanelSpec(
            title="Saturation",
            description="0 full quality, up to 0.8 quality given up, 1 at the floor and still "
            "violating. Scale replicas on it.",
            unit="short",
            stepped=True,
            width=6,
            queries=(Query(f"{CONTROLLER}_saturation_ratio{{{TARGET}}}", "{{instance}}"),),
        ),
        PanelSpec(
            title="Tick, CPU time",
            description="CPU seconds of one decision.",
            unit="s",
            width=12,
            queries=(Query(f"{CONTROLLER}_tick_seconds{{{TARGET}}}", "{{instance}}"),),
        ),
        PanelSpec(
            title="Age of the newest reading",
            description="Grows while SGLang does not answer.",
            unit="s",
            width=12,
            queries=(Query(f"{CONTROLLER}_sample_age_seconds{{{TARGET}}}", "{{instance}}"),),
        ),
    ),
)

ROWS = (SLOS, LOAD, BUDGET, WORKER, CONTROLLER_ROW)
