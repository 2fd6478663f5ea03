"""Simulator, the door for fleets: `sglang-alloc-controller simulate-replicas`."""

import csv
import io
import os
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from sglang_alloc_controller.cli_simulate import known_only, try_writing, write_result
from sglang_alloc_controller.simulator.cells import identity
from sglang_alloc_controller.simulator.pool import Progress, in_workers
from sglang_alloc_controller.simulator.replica_scores import FleetScore
from sglang_alloc_controller.simulator.replicas import (
    BALANCERS,
    LOSSES,
    NEVER,
    Fleet,
    refused_if_impossible,
    run_fleet,
)
from sglang_alloc_controller.simulator.world import World

RESULTS = "replicas.csv"
COLUMNS = (*Fleet._fields, *FleetScore._fields, "simulation")
Results = dict[Fleet, FleetScore]


class Fleets(NamedTuple):
    """What is to be simulated."""

    replicas: Sequence[int]
    balancers: Sequence[str]
    loads: Sequence[float]
    seconds: float
    seeds: Sequence[int]
    losses: Sequence[str] = (NEVER,)
    unnoticed_seconds: Sequence[float] = (0.0,)
    """Counts where a replica is lost."""

    def every(self) -> Iterator[Fleet]:
        """Yield each fleet, controlled and at full quality."""
        asked = product(
            self.replicas, self.balancers, self.loads, [self.seconds], self.seeds, [True, False],
            self.losses, self.unnoticed_seconds,
        )  # fmt: skip
        fleets = (Fleet(*cell) for cell in asked)
        yield from dict.fromkeys(
            one._replace(unnoticed_seconds=0.0) if one.lost == NEVER else one for one in fleets
        )


def checked(fleets: Fleets) -> Fleets:
    """Return the request.

    Raises:
        ConfigurationError: a balancer or a loss is unknown, or a fleet cannot lose a replica so.
    """
    known_only("balancer", fleets.balancers, BALANCERS)
    known_only("loss of a replica", fleets.losses, LOSSES)
    for fleet in fleets.every():
        refused_if_impossible(fleet)
    return fleets


def simulate_fleets(
    world: World, fleets: Fleets, out: Path | None, workers: int, progress: Progress
) -> Results:
    """Return every fleet's score; finished ones are kept in `out` and not simulated again.

    Interrupting it keeps what is finished.

    Raises:
        ConfigurationError: the results cannot be written, or a worker process died.
    """
    asked, simulation = list(fleets.every()), identity(world)
    done = {} if out is None else _kept(out / RESULTS, simulation)
    missing = sorted((one for one in asked if one not in done), key=_cost, reverse=True)
    if missing and out is not None:
        try_writing(out, RESULTS)
    workers = workers or os.cpu_count() or 1
    for fleet, score in in_workers(
        world, run_fleet, missing, cost=_cost, workers=workers, progress=progress
    ):
        done[fleet] = score
        if out is not None:
            write_result(out / RESULTS, results_csv(done, simulation))
    return {fleet: done[fleet] for fleet in asked}


def results_csv(results: Results, simulation: str) -> str:
    """Return the CSV; its last column tells which plant, settings and code it is of."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for fleet in sorted(results):
        numbers = (f"{number:.6g}" for number in results[fleet])
        writer.writerow([*fleet, *numbers, simulation])
    return text.getvalue()


def table(results: Results) -> str:
    """Return the results as Markdown, seeds averaged."""
    lines = [
        "| replicas | balancer | load | within SLO | at full quality | loss, 1/1000 nat | "
        "changes per hour (most) | spread of quality | spread of load | replica lost | "
        "requests lost | quality before, during, after | loss then |",
        f"|{13 * '---|'}",
    ]
    groups: dict[Fleet, list[FleetScore]] = {}
    for fleet, score in results.items():
        groups.setdefault(fleet._replace(seed=0), []).append(score)
    for fleet, scores in groups.items():
        if fleet.controlled:
            full = _mean(groups[fleet._replace(controlled=False)])
            lines.append(_line(fleet, _mean(scores), full))
    return "\n".join(lines)


def _line(fleet: Fleet, ours: FleetScore, full: FleetScore) -> str:
    return (
        f"| {fleet.replicas} | {fleet.balancer} | {fleet.load:g} | "
        f"{ours.slo_attainment_ratio:.2%} | {full.slo_attainment_ratio:.2%} | "
        f"{1000 * ours.mean_predicted_loss:.2f} | {ours.changes_per_hour:.1f} "
        f"({ours.changes_per_hour_max:.1f}) | {ours.position_spread:.3f} | "
        f"{ours.load_spread:.3f} | {_loss_of(fleet)} | {ours.requests_lost:.0f} | "
        f"{ours.position_before:.2f}, {ours.position_during:.2f}, {ours.position_after:.2f} | "
        f"{1000 * ours.loss_before:.2f}, {1000 * ours.loss_during:.2f}, "
        f"{1000 * ours.loss_after:.2f} |"
    )


def _loss_of(fleet: Fleet) -> str:
    if fleet.lost == NEVER:
        return NEVER
    return f"{fleet.lost}, noticed after {fleet.unnoticed_seconds:g} s"


def _mean(scores: Sequence[FleetScore]) -> FleetScore:
    return FleetScore(*(sum(column) / len(scores) for column in zip(*scores, strict=True)))


def _cost(fleet: Fleet) -> float:
    return fleet.replicas * fleet.seconds * (4.0 if fleet.controlled else 1.0)


def _kept(path: Path, simulation: str) -> Results:
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        return {_fleet(row): _score(row) for row in rows if row["simulation"] == simulation}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # not there, or of another kind: everything is simulated


def _fleet(row: dict[str, str]) -> Fleet:
    return Fleet(
        int(row["replicas"]), row["balancer"], float(row["load"]), float(row["seconds"]),
        int(row["seed"]), row["controlled"] == "True", row["lost"],
        float(row["unnoticed_seconds"]),
    )  # fmt: skip


def _score(row: dict[str, str]) -> FleetScore:
    return FleetScore(*(float(row[name]) for name in FleetScore._fields))
