"""Simulator check: a measurement as one JSON file, to be compared again without a server."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from sglang_alloc.bench.simulator_check.felt import (
    BudgetsFrom,
    Computed,
    Felt,
    Request,
    Run,
    Served,
)
from sglang_alloc.server_runs.errors import ServerRunError

_DIGITS = 5  # of a second: 10 microseconds


def write_served(path: Path, served: Served) -> None:
    """Write the measurement; NaN becomes null."""
    content = {**served._asdict(), "runs": [_run_to_json(run) for run in served.runs]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, separators=(",", ":"), allow_nan=False) + "\n")


def read_served(path: Path) -> Served:
    """Read what `write_served` wrote.

    Raises ServerRunError when it cannot be read or is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Served(
            facts=content["facts"],
            requests=tuple(Request(*one) for one in content["requests"]),
            phases=tuple((name, start, end) for name, start, end in content["phases"]),
            settings=content["settings"],
            max_running_requests=content["max_running_requests"],
            chunk_tokens=content["chunk_tokens"],
            runs=tuple(_run_from_json(one) for one in content["runs"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ServerRunError(
            f"{path} should hold a measurement of `python -m sglang_alloc.bench.simulator_check "
            f"measure` and cannot be used: {error!r}"
        ) from error


def _run_to_json(run: Run) -> dict[str, Any]:
    return {
        "name": run.name,
        "felt": [[_rounded(one.ttft_seconds), _rounded(one.itl_seconds)] for one in run.felt],
        "queue": [[_rounded(second), waiting] for second, waiting in run.queue],
        "budgets": [[_rounded(one.second), *one[1:]] for one in run.budgets],
        "prefill": [_rounded(one) for one in run.prefill],
        "decode": [_rounded(one) for one in run.decode],
    }


def _run_from_json(content: dict[str, Any]) -> Run:
    return Run(
        content["name"],
        tuple(Felt(_or_nan(ttft), _or_nan(itl)) for ttft, itl in content["felt"]),
        tuple((second, waiting) for second, waiting in content["queue"]),
        tuple(BudgetsFrom(*one) for one in content["budgets"]),
        Computed(*(_or_nan(one) for one in content["prefill"])),
        Computed(*(_or_nan(one) for one in content["decode"])),
    )


def _rounded(seconds: float) -> float | None:
    return None if math.isnan(seconds) else round(seconds, _DIGITS)


def _or_nan(seconds: float | None) -> float:
    return math.nan if seconds is None else seconds
