"""Bench of budgeted routing: `python -m moe_bench` in kernels/bench, or `make bench-gpu`.

Writes a CSV row per case with the GPU, driver, versions and commit. What an interrupted run, or one
that came to its time limit, has measured stays; the next run goes on where it ended.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from moe_bench.engine import prepare_engine
from moe_bench.facts import machine_columns, require_gpu
from moe_bench.measure import Bench, Row, measure_layer, measure_routing
from moe_bench.plan import KINDS, Unit, cpu_units, gpu_units
from moe_bench.results import Results
from moe_bench.roofline import Ceilings, measure_ceilings
from moe_bench.server_bench import (
    ON_CPU,
    ON_GPU,
    REPEATS,
    SERVED_FRACTIONS,
    SERVED_MODES,
    Case,
    IsLeft,
    ServerPlan,
    measure_server,
)
from moe_bench.shapes import SHAPES
from moe_bench.step_profile import ProfileCsv
from moe_bench.timing import Timer
from sglang_alloc.errors import AllocError
from sglang_alloc.server_runs.errors import ServerRunError
from sglang_alloc.server_runs.interruption import sigterm_interrupts
from sglang_alloc.server_runs.progress import Stage, StageProgress

DONE, FAILED, INTERRUPTED = 0, 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not measured yet; return 0 when everything is, or the time is over."""
    given = _parse(arguments)
    console = Console(stderr=True)
    try:
        if given.device == "cuda":
            require_gpu(serves="server" in given.kinds)
        with sigterm_interrupts():
            _run(given, console)
    except AllocError as error:
        console.print(f"The bench stopped: {error}", markup=False, highlight=False, soft_wrap=True)
        return FAILED
    except KeyboardInterrupt:
        console.print("Interrupted: what was finished is kept, the next run goes on behind it.")
        return INTERRUPTED
    return DONE


def _run(given: argparse.Namespace, console: Console) -> None:
    device = torch.device(given.device)
    machine = machine_columns(device)
    if given.profile:
        path = given.out / f"steps-{device.type}.csv"
        given.server = given.server._replace(profile=ProfileCsv(path, machine))
    results = Results(given.out / f"moe-{device.type}.csv", machine)
    units = cpu_units() if device.type == "cpu" else gpu_units(given.kinds, given.shapes)
    wanted = [u for u in units if u.kind in given.kinds and _has_size(u, given.tokens)]
    units = [u for u in wanted if not _is_done(results, u, given.server)]
    deadline = time.monotonic() + 60.0 * given.minutes
    progress = StageProgress([Stage(unit.name, unit.expected_seconds) for unit in units], console)
    prepare_engine(device)
    timer = Timer(device, window_seconds=0.01 if device.type == "cuda" else 0.002)
    bench = Bench(device, timer, _ceilings(timer, device))
    columns = {
        "copy_gb_per_second": f"{bench.ceilings.bytes_per_second / 1e9:.4g}",
        "matmul_tflops": f"{bench.ceilings.flops_per_second / 1e12:.4g}",
    }
    failed: list[str] = []
    with progress.shown():
        for position, unit in enumerate(units):
            if time.monotonic() > deadline:
                left = len(units) - position
                console.print(
                    f"The time limit of {given.minutes:g} minutes: {left} units are left."
                )
                break
            with progress.stage(unit.name):
                try:
                    for rows in _measured(bench, unit, given, results):
                        results.add(rows, columns)
                        if time.monotonic() > deadline:
                            break
                except ServerRunError as error:  # this model's servers; the next one's may fit
                    failed.append(f"{unit.name}: {error}")
            if device.type == "cuda":
                torch.cuda.empty_cache()
    console.print(f"Results: {(given.out / f'moe-{device.type}.csv').resolve()}", soft_wrap=True)
    if failed:
        raise ServerRunError("some servers could not be measured. " + "\n".join(failed))


def _measured(
    bench: Bench, unit: Unit, given: argparse.Namespace, results: Results
) -> Iterator[list[Row]]:
    """Yield rows that are kept together: all of a unit, or one case of its servers."""
    if unit.kind == "server":
        is_left = _left_of(results, unit)
        yield from measure_server(unit.shape.name, given.server, is_left, given.out)
    elif unit.kind == "routing":
        yield list(measure_routing(bench, unit.shape, unit.num_tokens))
    else:
        yield list(measure_layer(bench, unit.shape, unit.num_tokens, unit.kind))


def _left_of(results: Results, unit: Unit) -> IsLeft:
    """Return what tells whether a server's mode, case and budget have no row yet."""

    def is_left(mode: str, case: Case, budget: str) -> bool:
        return not results.has(f"server {case.kind}", unit.shape.name, case.size, mode, budget)

    return is_left


def _has_size(unit: Unit, tokens: Sequence[int]) -> bool:
    return unit.kind == "server" or not tokens or unit.num_tokens in tokens


def _is_done(results: Results, unit: Unit, server: ServerPlan) -> bool:
    if unit.kind == "server":
        return not server.modes_left(_left_of(results, unit))
    return results.has(unit.kind, unit.shape.name, unit.num_tokens)


def _ceilings(timer: Timer, device: torch.device) -> Ceilings:
    if device.type == "cuda":
        ceilings = measure_ceilings(timer, device)
        torch.cuda.empty_cache()  # a server may start next, and sizes itself by what is free
        return ceilings
    return measure_ceilings(timer, device, copy_bytes=2**24, matmul_size=256)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="moe_bench", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder of the CSV")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin nothing after these")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    names = tuple(shape.name for shape in SHAPES)
    parser.add_argument("--shapes", nargs="+", choices=names, default=names)
    parser.add_argument("--tokens", nargs="+", type=int, help="sizes to measure, not of servers")
    parser.add_argument("--modes", nargs="+", choices=SERVED_MODES, help="served modes")
    parser.add_argument(
        "--budgets", nargs="+", choices=tuple(SERVED_FRACTIONS), help="served budgets"
    )
    for name, what in (
        ("--concurrencies", "requests at once at servers; none: no decode"),
        ("--prefills", "tokens of prompts at servers; none: no prefill"),
    ):
        parser.add_argument(name, nargs="*", type=int, help=what)
    parser.add_argument("--repeats", type=int, help=f"of each served case ({REPEATS})")
    parser.add_argument("--beside", type=int, help="modes served at once beside stock (1)")
    parser.add_argument(
        "--profile", action="store_true", help="add where the time of the first decode case goes"
    )
    given = parser.parse_args(arguments)
    given.kinds, given.shapes = tuple(given.kinds), tuple(given.shapes)
    if given.beside is not None and given.beside < 1:
        parser.error(f"--beside {given.beside}: at least one mode is served beside stock")
    given.server = _server_plan(given)
    return given


def _server_plan(given: argparse.Namespace) -> ServerPlan:
    """Return what to serve: the device's plan, with what was asked for in its place."""
    asked = {
        "modes": given.modes,
        "fractions": given.budgets and {name: SERVED_FRACTIONS[name] for name in given.budgets},
        "repeats": given.repeats,
        "concurrencies": given.concurrencies,
        "prefill_tokens": given.prefills,
    }
    # Each once, in the order given.
    once: dict[str, Any] = {
        name: tuple(dict.fromkeys(values)) if isinstance(values, list) else values
        for name, values in asked.items()
        if values is not None
    }
    plan = ON_GPU if given.device == "cuda" else ON_CPU
    return plan._replace(**once, beside=given.beside or plan.beside)


if __name__ == "__main__":
    sys.exit(main())
