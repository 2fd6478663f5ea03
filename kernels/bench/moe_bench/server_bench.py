"""Bench, whole steps: a real SGLang server with dummy weights, stock and with budgets, over HTTP.

Requests carry token ids, drawn anew for each batch. A decode step is the difference between long
and short answers, so that HTTP and prefill cancel; prefill is the time until the first tokens.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import httpx2

from moe_bench.budgets import FRACTIONS, MODES
from moe_bench.dummy_models import even_tables, threshold_tables, write_model
from moe_bench.measure import Row
from sglang_alloc.demo.errors import DemoError
from sglang_alloc.demo.heldout_loss import BudgetOverride
from sglang_alloc.demo.server_process import Server, serve
from sglang_alloc.shared_table import SharedTable, publish_shared_table

CONCURRENCIES = (1, 8, 16, 32, 64, 128, 256, 512)
PREFILL_TOKENS = (1024, 4096, 16384)
DECODE_STEPS, PROMPT_TOKENS, REPEATS = 64, 32, 5
FIT_REQUESTS, FIT_TOKENS, FIT_STEPS = 16, 32, 5
READY_SECONDS = 900.0
GPU_ARGUMENTS = (
    *("--device", "cuda"),
    *("--attention-backend", "triton"),
    *("--sampling-backend", "pytorch"),
    *("--moe-runner-backend", "triton"),
    *("--mem-fraction-static", "0.85"),
    *("--max-running-requests", "512"),
    *("--cuda-graph-max-bs-decode", "512"),  # the default depends on the memory, and stops below
    *("--chunked-prefill-size", "16384"),
)
GPU_ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "0"}
DUMMY_ARGUMENTS = (
    *("--load-format", "dummy"),
    "--skip-tokenizer-init",
    "--disable-radix-cache",
    "--skip-server-warmup",
)


class ServerPlan(NamedTuple):
    """What to serve and how much to measure; the defaults are for a GPU."""

    arguments: Sequence[str] = GPU_ARGUMENTS
    environment: Mapping[str, str] = GPU_ENVIRONMENT
    model_changes: Mapping[str, Any] = {}
    modes: Sequence[str] = MODES
    concurrencies: Sequence[int] = CONCURRENCIES
    prefill_tokens: Sequence[int] = PREFILL_TOKENS
    decode_steps: int = DECODE_STEPS
    repeats: int = REPEATS


ON_GPU = ServerPlan()
# The small model, to see that this works: a CPU's times say nothing of a GPU's.
ON_CPU = ServerPlan((), {}, {}, MODES, (1, 8), (256,), decode_steps=16, repeats=3)


class Case(NamedTuple):
    """One thing to time: `decode` at a concurrency or `prefill` of a number of tokens."""

    kind: str
    size: int


def measure_server(shape_name: str, plan: ServerPlan, log_folder: Path) -> Iterator[Row]:
    """Serve the model stock, then once per mode; yield decode and prefill rows of every budget.

    `server decode` has a row's time per step, `server prefill` per batch of one prompt.
    """
    with tempfile.TemporaryDirectory(prefix="sglang-alloc-") as scratch:
        model = write_model(Path(scratch) / shape_name, shape_name, **plan.model_changes)
        table_path = Path(scratch) / "bench.tbl"
        cases = [Case("decode", size) for size in plan.concurrencies]
        cases += [Case("prefill", size) for size in plan.prefill_tokens]
        with _served(model, None, None, plan, log_folder) as server:
            stock = {case: _timed(server, case, plan) for case in cases}
        for case in cases:
            yield _row(shape_name, case, "-", "full", "stock", stock[case], stock[case], None)
        for mode in plan.modes:
            tables = threshold_tables(model) if mode == "threshold" else even_tables(model)
            publish_shared_table(table_path, tables, mode_note=mode)
            with (
                _served(model, table_path, mode, plan, log_folder) as server,
                closing(SharedTable.open(table_path)) as table,
            ):
                for budget, fraction in FRACTIONS.items():
                    activations = round(fraction * table.shape.budget_max)
                    if mode == "threshold" and fraction < 1.0:
                        activations = fit_thresholds(server, table, activations)
                    for case in cases:
                        # Each case anew: an override ends by itself after some minutes.
                        BudgetOverride(table).set(activations, activations)
                        before = table.worker_counters()[0]
                        times = _timed(server, case, plan)
                        _settle(server, case)
                        used = _used(before, table.worker_counters()[0], case, table)
                        yield _row(
                            *(shape_name, case, mode, budget, "plugin", times, stock[case], used)
                        )


class Used(NamedTuple):
    """What the worker measured over a case: means per token, and per layer and step."""

    activations_per_token: float | None
    distinct_experts: float | None


def _used(before: Any, after: Any, case: Case, table: SharedTable) -> Used:
    def added(name: str) -> int:
        return int(getattr(after, name) - getattr(before, name))

    tokens = added(f"sampled_{case.kind}_tokens")
    steps = added("sampled_decode_steps") * table.shape.num_layers
    activations = added(f"sampled_{case.kind}_activations")
    distinct = added("distinct_experts")
    return Used(
        activations / tokens / table.shape.num_layers if tokens else None,
        distinct / steps if steps and case.kind == "decode" else None,
    )


def fit_thresholds(server: Server, table: SharedTable, activations: int) -> int:
    """Return the budget whose thresholds really keep so many activations.

    Calibration does this for a trained model. A row that affords one activation more keeps about
    one more, whatever the routing, so a few corrections do.
    """
    case, shape = Case("decode", FIT_REQUESTS), table.shape
    tried: dict[int, float] = {}  # by budget, how far from what it should keep
    budget = activations
    while budget not in tried and len(tried) < FIT_STEPS:
        BudgetOverride(table).set(budget, budget)
        before = table.worker_counters()[0]
        with _client(server) as client:
            _generate(client, FIT_REQUESTS, PROMPT_TOKENS, FIT_TOKENS, random.Random(budget))
        _settle(server, case)
        used = _used(before, table.worker_counters()[0], case, table)
        kept = (used.activations_per_token or 0.0) * shape.num_layers
        tried[budget] = abs(kept - activations)
        budget += round(activations - kept)
        budget = min(max(budget, shape.budget_min), shape.budget_max - 1)
    return min(tried, key=lambda one: tried[one])


def _settle(server: Server, case: Case) -> None:
    """Let the worker report: it does so twice a second, with what it had fetched before."""
    with _client(server) as client:
        for _ in range(3):
            time.sleep(0.6)
            _generate(client, 1, 4, 2 if case.kind == "decode" else 1, random.Random(0))


def _served(
    model: Path, table: Path | None, mode: str | None, plan: ServerPlan, log_folder: Path
) -> Any:
    return serve(
        model,
        log_path=log_folder / f"{model.name}-{mode or 'stock'}.log",
        table=table,
        mode=mode,
        extra_args=(*plan.arguments, *DUMMY_ARGUMENTS),
        env=plan.environment,
        ready_timeout_seconds=READY_SECONDS,
    )


def _timed(server: Server, case: Case, plan: ServerPlan) -> list[float]:
    """Return seconds per decode step, or per prefill, of each repeat, in ascending order."""
    generator = random.Random(case.size)
    with _client(server) as client:
        if case.kind == "prefill":
            _generate(client, 1, case.size, 1, generator)
            return sorted(
                _generate(client, 1, case.size, 1, generator) for _ in range(plan.repeats)
            )
        _generate(client, case.size, PROMPT_TOKENS, 4, generator)
        times = []
        for _ in range(plan.repeats):
            short = _generate(client, case.size, PROMPT_TOKENS, 1, generator)
            long = _generate(client, case.size, PROMPT_TOKENS, 1 + plan.decode_steps, generator)
            times.append((long - short) / plan.decode_steps)
        return sorted(times)


def _generate(
    client: httpx2.Client, requests: int, prompt_tokens: int, tokens: int, generator: random.Random
) -> float:
    """Let the server answer a batch with exactly `tokens` tokens each; return the seconds."""
    prompts = [[generator.randrange(2, 500) for _ in range(prompt_tokens)] for _ in range(requests)]
    sampling = {"max_new_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
    started = time.perf_counter()
    response = client.post("/generate", json={"input_ids": prompts, "sampling_params": sampling})
    seconds = time.perf_counter() - started
    if response.status_code != 200:
        raise DemoError(
            f"a batch of {requests} prompts of {prompt_tokens} tokens was answered with HTTP "
            f"{response.status_code}: {response.text[:200]}"
        )
    return seconds


def _client(server: Server) -> httpx2.Client:
    return httpx2.Client(base_url=server.url, timeout=600.0, trust_env=False)


def _row(
    shape: str,
    case: Case,
    mode: str,
    budget: str,
    variant: str,
    times: Sequence[float],
    stock: Sequence[float],
    used: Used | None,
) -> Row:
    middle, stock_middle = times[len(times) // 2], stock[len(stock) // 2]
    return Row(
        *(f"server {case.kind}", shape, case.size, mode, budget, variant),
        median_us=1e6 * middle,
        low_us=1e6 * times[0],
        high_us=1e6 * times[-1],
        stock_us=1e6 * stock_middle,
        speedup=stock_middle / middle,
        activations_per_token=None if used is None else used.activations_per_token,
        distinct_experts=None if used is None else used.distinct_experts,
    )
