"""Offline story, judging: lm-evaluation-harness against a server, at a budget that stays put."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import httpx2

from sglang_alloc.demo.errors import DemoError
from sglang_alloc.demo.heldout_loss import BudgetOverride, flush_cache
from sglang_alloc.errors import AllocError
from sglang_alloc.shared_table import SharedTable

LIMIT_SECONDS = 23 * 3600.0  # the table allows a day
ENDPOINT = "/v1/completions"  # the one that answers with the logprobs of a prompt


class HarnessError(AllocError):
    """The harness is not there, did not run, or did not run at the budget that was asked for."""


class HarnessRun(NamedTuple):
    """One run of lm_eval: which server, at which budget, with which arguments, and where to."""

    url: str
    table: Path
    budget: int
    tokenizer: str
    output: Path
    arguments: Sequence[str]


def run_harness(asked: HarnessRun) -> Path:
    """Hold the budget, run lm_eval to its end, return the folder of its results.

    The budget holds for prefill and decode, by the shared table's override, on an empty prefix
    cache; it is released afterwards, whatever happened.

    Raises:
        HarnessError: lm_eval is missing or failed, the budget is not in the table, or it was not
            in force from beginning to end.
    """
    program = find_harness()
    with SharedTable.open(asked.table) as table:
        _require_budget(table, asked)
        override = BudgetOverride(table, limit_seconds=LIMIT_SECONDS)
        with httpx2.Client(base_url=asked.url, timeout=120.0, trust_env=False) as client:
            try:
                flush_cache(client)
                override.set(asked.budget, asked.budget)
                finished = subprocess.run(harness_command(program, asked), check=False)
                _require_still_in_force(table, asked)
            except (DemoError, httpx2.TransportError) as error:
                raise HarnessError(f"The server at {asked.url} was not ready: {error}") from error
            finally:
                override.clear()
    if finished.returncode:
        raise HarnessError(
            f"lm_eval ended with exit status {finished.returncode}; its own messages say why."
        )
    return asked.output


def find_harness() -> str:
    """Return the path of lm_eval, beside this interpreter or on the PATH."""
    beside = Path(sys.executable).parent / "lm_eval"
    found = str(beside) if beside.exists() else shutil.which("lm_eval")
    if found is None:
        raise HarnessError(
            'lm_eval was not found. Install it with `pip install "lm-eval[api]"`, in an '
            "environment of its own if you like, and put it on the PATH."
        )
    return found


def harness_command(program: str, asked: HarnessRun) -> list[str]:
    """Return the command line of lm_eval for the server's completions."""
    model = {
        "model": asked.tokenizer,
        "base_url": asked.url.rstrip("/") + ENDPOINT,
        "tokenizer": asked.tokenizer,
        "tokenizer_backend": "huggingface",
        "tokenized_requests": "True",
        "num_concurrent": "8",
    }
    given = ",".join(f"{name}={value}" for name, value in model.items())
    return [
        *(program, "--model", "local-completions", "--model_args", given),
        *("--output_path", str(asked.output), *asked.arguments),
    ]


def _require_budget(table: SharedTable, asked: HarnessRun) -> None:
    shape = table.shape
    if not shape.budget_min <= asked.budget <= shape.budget_max:
        raise HarnessError(
            f"Budget {asked.budget} was asked for; {asked.table} has budgets {shape.budget_min} to "
            f"{shape.budget_max}."
        )


def _require_still_in_force(table: SharedTable, asked: HarnessRun) -> None:
    """The override ends by itself after a while: a run that outlasts it is no result."""
    found = table.worker_counters()[0]
    if (found.prefill_budget, found.decode_budget) != (asked.budget, asked.budget):
        raise HarnessError(
            f"At the end of the run the server obeyed budgets {found.prefill_budget}/"
            f"{found.decode_budget}, not {asked.budget}: the override had run out or somebody "
            "changed it. Split the tasks into shorter runs."
        )
