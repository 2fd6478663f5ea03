"""Offline story, judging: lm-evaluation-harness against a server, at a budget that stays put."""

import math
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import httpx2

from sglang_alloc.errors import AllocError
from sglang_alloc.server_runs.budget_override import OVERRIDE_CODE, BudgetOverride, flush_cache
from sglang_alloc.server_runs.errors import ServerRunError
from sglang_alloc.shared_table import SharedTable, WorkerCounters

# The override is short and renewed, so that it soon ends when this process is killed.
HOLD_SECONDS = 180.0
RENEW_SECONDS = 60.0
ENDPOINT = "/v1/completions"  # the one that answers with the logprobs of a prompt
ACTOR = "evaluate-served"
LOOK_EVERY_SECONDS = 1.0  # how soon a run that lost its budget is stopped
STOP_SECONDS = 20.0  # for lm_eval to end when asked


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


class Measured(NamedTuple):
    """Routed-expert activations per token during a run; None where the worker measured none."""

    prefill: float | None
    decode: float | None


def run_harness(asked: HarnessRun) -> Measured:
    """Hold the budget and run lm_eval to its end; its results lie in `asked.output`.

    The budget holds for prefill and decode, by the shared table's override, on an empty prefix
    cache. The override is renewed while lm_eval runs and cleared afterwards, whatever happened.
    Meanwhile the server is looked at every second: a run that loses its budget is stopped, because
    its results mean nothing.

    Raises:
        HarnessError: lm_eval is missing or failed, the budget is not in the table, or it was not
            in force from beginning to end.
    """
    program = find_harness()
    with SharedTable.open(asked.table) as table:
        _require_budget(table, asked)
        _require_free(table)
        _flush(asked)
        hold = _Hold(table, asked)
        try:
            hold.renew()
            before = table.worker_counters()[0]
            _run_at_budget(harness_command(program, asked), hold)
            return _measured(before, hold.counters())
        finally:
            hold.release()


def find_harness() -> str:
    """Return the path of lm_eval, beside this interpreter or on the PATH."""
    beside = Path(sys.executable).parent / "lm_eval"
    found = str(beside) if beside.exists() else shutil.which("lm_eval")
    if found is None:
        raise HarnessError(
            "lm_eval was not found. Install it from the clone with `pip install '.[evaluate]'`, or "
            "in an environment of its own that is on the PATH."
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


class _Hold:
    """The override that this run has set, and whether it is the one that the server obeys."""

    def __init__(self, table: SharedTable, asked: HarnessRun) -> None:
        self._table, self._asked = table, asked
        self._override = BudgetOverride(table, limit_seconds=HOLD_SECONDS, actor=ACTOR)
        self._renewed = -math.inf
        self._held: WorkerCounters | None = None

    def renew(self) -> None:
        """Set the override again if it is time; return when the server has acknowledged it."""
        if time.monotonic() < self._renewed + RENEW_SECONDS:
            return
        try:
            self._override.set(self._asked.budget, self._asked.budget)
        except ServerRunError as error:
            raise HarnessError(f"The budget cannot be held: {error}") from error
        self._renewed = time.monotonic()
        self._held = self._table.worker_counters()[0]

    def counters(self) -> WorkerCounters:
        """Return the server's counters of all that it has computed.

        It writes them twice a second while it computes, and when it takes a change of the budgets
        over: so the override is set once more, without a change of the budgets.
        """
        self._renewed = -math.inf
        self.renew()
        assert self._held is not None
        return self._held

    def release(self) -> None:
        """End the override, unless somebody else has set one meanwhile."""
        override = self._table.override(time.monotonic_ns())
        if override is not None and override.actor == ACTOR:
            self._table.clear_override()

    def require(self) -> None:
        """Raise `HarnessError` unless the budget has been in force since it was set."""
        assert self._held is not None
        override = self._table.override(time.monotonic_ns())
        found, ours = self._table.worker_counters()[0], self._held.acknowledged_generation
        if (
            override is not None
            and override.generation == ours
            and found.pid == self._held.pid
            and (found.acknowledged_source, found.acknowledged_generation) == (OVERRIDE_CODE, ours)
        ):
            return
        raise HarnessError(
            f"During the run the server stopped obeying budget {self._asked.budget}: it is at "
            f"{found.prefill_budget}/{found.decode_budget} now. Somebody changed or cleared the "
            "override, or the server was started again. Nothing of this run counts: run it again."
        )


def _flush(asked: HarnessRun) -> None:
    try:
        with httpx2.Client(base_url=asked.url, timeout=120.0, trust_env=False) as client:
            flush_cache(client)
    except (ServerRunError, httpx2.TransportError) as error:
        raise HarnessError(f"The server at {asked.url} was not ready: {error}") from error


def _run_at_budget(command: Sequence[str], hold: _Hold) -> None:
    process = subprocess.Popen(command)
    try:
        while (status := _waited(process)) is None:
            hold.require()
            hold.renew()
        hold.require()
    finally:
        _stop(process)
    if status:
        raise HarnessError(f"lm_eval ended with exit status {status}; its own messages say why.")


def _waited(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(LOOK_EVERY_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _require_budget(table: SharedTable, asked: HarnessRun) -> None:
    shape = table.shape
    if not shape.budget_min <= asked.budget <= shape.budget_max:
        raise HarnessError(
            f"Budget {asked.budget} was asked for; {asked.table} has budgets {shape.budget_min} to "
            f"{shape.budget_max}."
        )


def _require_free(table: SharedTable) -> None:
    override = table.override(time.monotonic_ns())
    if override is not None and override.actor != ACTOR:
        raise HarnessError(
            f"{override.actor} has set the budget by hand. End that with `sglang-alloc set "
            "--clear`, or wait until it runs out."
        )


def _measured(before: WorkerCounters, after: WorkerCounters) -> Measured:
    return Measured(
        _per_token(
            after.sampled_prefill_activations - before.sampled_prefill_activations,
            after.sampled_prefill_tokens - before.sampled_prefill_tokens,
        ),
        _per_token(
            after.sampled_decode_activations - before.sampled_decode_activations,
            after.sampled_decode_tokens - before.sampled_decode_tokens,
        ),
    )


def _per_token(activations: int, tokens: int) -> float | None:
    return activations / tokens if tokens else None
