"""SGLang ends and starts anew under its controller, on the same port and the same shared table."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from live_ordeals import Pair
from live_parts import live_load, live_server
from waiting import PATIENCE_SECONDS, wait_until

from sglang_alloc.demo.trace import LoadPhase
from sglang_alloc.shared_table_words import WorkerCounters

# Long enough to be judged, and for budgets that went up meanwhile to come down again.
LOAD = LoadPhase("after", seconds=10.0, requests_per_second=2.0)
_STARTS = "engine_restarts_total"


class Restart(NamedTuple):
    """What was seen of it."""

    state_without_server: str
    state_after: str
    starts_seen: float
    """Starts of the engine that the controller counted meanwhile."""
    pid_before: int
    worker: WorkerCounters
    """The new worker, when it followed the controller."""
    errors: list[str]
    """Of the requests to the new server."""
    seconds: float
    """That it all took."""


def restart(pair: Pair, folder: Path, serving: ExitStack) -> Restart:
    """Close `serving`, which holds the server, and start it anew in it, under load."""
    began, starts_before = time.monotonic(), pair.metric(_STARTS)
    pid_before = pair.table.worker_counters()[0].pid
    serving.close()
    wait_until(lambda: pair.state() == "stale", "the end of the server was noticed")
    state_without_server = pair.state()
    serving.enter_context(live_server(folder, urlsplit(pair.server_url).port))
    with live_load(pair.server_url, LOAD) as load:
        wait_until(lambda: pair.state() == "valid", "the new server was seen")
        state_after = pair.state()
        worker = wait_until(lambda: _following(pair, pid_before), "the new worker obeyed")
        records = load.result(timeout=LOAD.seconds + PATIENCE_SECONDS)
    return Restart(
        state_without_server,
        state_after,
        pair.metric(_STARTS) - starts_before,
        pid_before,
        worker,
        [record.error for record in records if record.error],
        time.monotonic() - began,
    )


def _following(pair: Pair, pid_before: int) -> WorkerCounters | None:
    worker = pair.table.worker_counters()[0]
    follows = worker.follows_controller(pair.table.selector().generation)
    return worker if worker.pid != pid_before and follows else None
