"""Simulator check, third step: the served trace through the simulator, by its public functions."""

from __future__ import annotations

from pathlib import Path

from sglang_alloc.allocation_mode import PHASES
from sglang_alloc.bench.simulator_check.felt import BudgetsFrom, Computed, Felt, Run, Served
from sglang_alloc.predicted_loss import predicted_loss
from sglang_alloc.shared_table import SharedTable
from sglang_alloc_controller.bench_csv import read_step_times
from sglang_alloc_controller.quality_bounds import budget_ranges
from sglang_alloc_controller.settings import Settings, parse_settings
from sglang_alloc_controller.simulator.laws import Law, OurLaw, StaticLaw
from sglang_alloc_controller.simulator.plant import Plant
from sglang_alloc_controller.simulator.run_law import Change, run_law
from sglang_alloc_controller.simulator.scenarios import Faults, Scenario
from sglang_alloc_controller.simulator.workload import Workload

# A law that asks for the same budgets always may be asked as seldom.
POLL_SECONDS = 1.0


def plant_of(served: Served, table: SharedTable, bench_csv: Path) -> Plant:
    """Return the server that was measured, by the bench of the same machine."""
    shape = table.shape
    prefill, decode = (
        tuple(float(one) for one in predicted_loss(table, phase)) for phase in PHASES
    )
    return Plant(
        times=read_step_times(bench_csv),
        budget_min=shape.budget_min,
        budget_max=shape.budget_max,
        prefill_losses=prefill,
        decode_losses=decode,
        max_running_requests=served.max_running_requests,
        chunk_tokens=served.chunk_tokens,
    )


def simulate(served: Served, run: Run, plant: Plant, table: SharedTable, bench_csv: Path) -> Run:
    """Return what the simulator makes of the same arrivals, lengths and budgets or controller.

    `bench_csv` is what the served controller knew of the server, if it was told.
    """
    if run.name not in served.settings:
        fixed = StaticLaw(_fixed_budgets(run))
        return simulate_law(served, run.name, fixed, plant, POLL_SECONDS)
    content = {**served.settings[run.name], "table": str(table.path)}
    if "cost_model" in content["quality"]:
        content["quality"] = {**content["quality"], "cost_model": str(bench_csv)}
    settings = parse_settings(content)
    law = _our_law(settings, table)
    return simulate_law(served, run.name, law, plant, settings.source.poll_seconds)


def simulate_law(served: Served, name: str, law: Law, plant: Plant, poll_seconds: float) -> Run:
    """Return what one law makes of the trace, polling once in so many seconds."""
    faults = Faults(poll_seconds=poll_seconds)
    seconds = served.phases[-1][2]
    scenario = Scenario(name, seconds, lambda capacities, seed: lambda now: 0.0, 0.0, faults=faults)
    workload = Workload(
        tuple(request.due_second for request in served.requests),
        tuple(request.prompt_tokens for request in served.requests),
        tuple(request.output_tokens for request in served.requests),
    )
    found = run_law(law, scenario, workload, plant, seed=0)
    felt = {one.request: Felt(one.ttft_seconds, one.itl_seconds) for one in found.outcomes}
    return Run(
        name,
        tuple(felt[index] for index in range(len(workload))),
        tuple((second, float(waiting)) for second, waiting in found.queue),
        tuple(_budgets_from(change) for change in found.changes),
        *(Computed(one.mean_budget, one.calm_ratio) for one in found.obeyed),
    )


def _budgets_from(change: Change) -> BudgetsFrom:
    calm = change.budgets if change.calm is None else change.calm[:2]
    return BudgetsFrom(change.seconds, *change.budgets, *calm)


def _our_law(settings: Settings, table: SharedTable) -> Law:
    return OurLaw(settings, budget_ranges(table, settings))


def _fixed_budgets(run: Run) -> tuple[int, int]:
    last = run.budgets[-1]
    return last.prefill_budget, last.decode_budget
