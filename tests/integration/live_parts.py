"""What live stories are made of: a real SGLang server, its controller, and a load on them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from live_ordeals import LOST_SECONDS
from waiting import PATIENCE_SECONDS

from sglang_alloc.budget_tables import load_budget_tables
from sglang_alloc.demo.load import RequestRecord, offer_load
from sglang_alloc.demo.trace import LoadPhase, make_trace
from sglang_alloc.server_runs.owned_process import OwnedProcess, owned_process
from sglang_alloc.server_runs.reference_files import MODEL, REFERENCE
from sglang_alloc.server_runs.server_process import (
    Server,
    console_script,
    serve,
    wait_until_ready,
)
from sglang_alloc.shared_table import publish_shared_table

STALE_AFTER_SECONDS = 3.0


@contextmanager
def live_server(folder: Path, port: int | None = None) -> Iterator[Server]:
    """Run SGLang with the reference model and the shared table `folder`/live.tbl.

    The table is published unless it is there; without a `port` one is chosen.
    """
    edges = ("0.001", "0.01", "0.05", "0.1", "1", "10")
    arguments = (
        *("--dtype", "float32", "--skip-server-warmup", "--decode-log-interval", "5"),
        *("--bucket-inter-token-latency", *edges),
        *("--bucket-time-to-first-token", "0.002", *edges[1:]),
    )
    environment = {"SGLANG_ALLOC_STALE_AFTER_SECONDS": str(STALE_AFTER_SECONDS)}
    table = folder / "live.tbl"
    if not table.exists():
        publish_shared_table(table, load_budget_tables(MODEL / "budget_tables.npz"))
    with serve(
        MODEL,
        table=table,
        port=port,
        log_path=folder / f"server-{time.monotonic_ns()}.log",
        extra_args=arguments,
        env=environment,
    ) as server:
        yield server


@contextmanager
def live_controller(folder: Path, config: Path, port: int) -> Iterator[OwnedProcess]:
    """Run the controller with this configuration until the block ends."""
    command = [console_script("sglang-alloc-controller"), "run", "--config", str(config)]
    log = folder / f"controller-{time.monotonic_ns()}.log"
    with owned_process("the controller", command, log_path=log) as process:
        wait_until_ready(process, f"http://127.0.0.1:{port}/livez", PATIENCE_SECONDS)
        yield process


@contextmanager
def live_load(server: str, load: LoadPhase) -> Iterator[Future[list[RequestRecord]]]:
    """Offer this load while the block runs, of short prompts and answers of 24 tokens."""
    texts = [path.read_text() for path in sorted((REFERENCE / "samples").glob("heldout_*.txt"))]
    trace = make_trace(texts, [load], prompt_bytes=200, output_tokens=24, seed=3)
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(
            lambda: asyncio.run(offer_load(server, trace, timeout_seconds=LOST_SECONDS))
        )
