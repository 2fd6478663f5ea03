"""What the live pair is put through while it serves: faults of people, files and processes.

Each ordeal leaves what was seen of it; that no request was lost shows in the load's own records.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import httpx2
import yaml
from waiting import PATIENCE_SECONDS, wait_until

from sglang_alloc.demo.load import RequestRecord, send_request, streaming_client
from sglang_alloc.demo.trace import TracedRequest
from sglang_alloc.server_runs.server_process import console_script
from sglang_alloc.shared_table import SharedTable
from sglang_alloc.shared_table_words import source_code
from sglang_alloc_controller.sglang_loads import LOADS_PATH, parse_loads

# A request that a busy machine answers late is not lost.
LOST_SECONDS = 240.0
# A worker that heard no heartbeat would be in its fallback by then.
WATCHED_SECONDS = 5.0
# Long enough to be running when the scheduler is stopped, and after it goes on.
_LONG = TracedRequest(0, "hang", 0.0, "A scheduler that is stopped", output_tokens=1000)
_OWN = "sglang_alloc_controller_"
_TICK_ERRORS = "tick_errors_total"


class Pair(NamedTuple):
    """The running server and controller."""

    server_url: str
    server_group: int
    """Process group of SGLang."""
    controller_url: str
    config: Path
    table: SharedTable

    def state(self) -> str:
        """Return the state of the controller's input."""
        prefix = f'{_OWN}input_state{{state="'
        one_hot = [line for line in self._metrics() if line.startswith(prefix)]
        return next(line[len(prefix) :].split('"')[0] for line in one_hot if line.endswith(" 1.0"))

    def metric(self, name: str) -> float:
        """Return one of the controller's own metrics that has no labels."""
        prefix = f"{_OWN}{name} "
        return next(
            float(line[len(prefix) :]) for line in self._metrics() if line.startswith(prefix)
        )

    def _metrics(self) -> list[str]:
        text = httpx2.get(f"{self.controller_url}/metrics", timeout=10.0, trust_env=False).text
        return text.splitlines()


@dataclass
class Ordeals:
    """What was seen."""

    long_request: RequestRecord | None = None
    """A request that the hang caught in the middle."""
    hung_state: str = ""
    state_after_hang: str = ""
    second_controller: subprocess.CompletedProcess[str] | None = None
    refused_reload: str = ""
    sources_after_deletion: set[int] = field(default_factory=set)
    tick_errors: float = -1.0


def go_through(pair: Pair) -> Ordeals:
    """Put the pair through all of them."""
    seen = Ordeals()
    with ThreadPoolExecutor(1) as pool:
        long_request = pool.submit(lambda: asyncio.run(_send(pair.server_url, _LONG)))
        with _hanging_scheduler(pair):
            wait_until(lambda: pair.state() == "stale", "the hang was noticed")
            seen.hung_state = pair.state()
        wait_until(lambda: pair.state() == "valid", "the server was seen again")
        seen.state_after_hang = pair.state()
        seen.long_request = long_request.result()
    command = [console_script("sglang-alloc-controller"), "run", "--config", str(pair.config)]
    seen.second_controller = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS
    )
    seen.refused_reload = _reload_nonsense(pair)
    with _shared_file_deleted(pair.table.path):
        ends = time.monotonic() + WATCHED_SECONDS
        while time.monotonic() < ends:
            seen.sources_after_deletion |= {
                one.acknowledged_source for one in pair.table.worker_counters()
            }
            time.sleep(0.1)
    seen.tick_errors = pair.metric(_TICK_ERRORS)
    return seen


def in_control() -> set[int]:
    """Return the sources of a worker that follows its controller all the time."""
    return {source_code("controller")}


async def _send(url: str, request: TracedRequest) -> RequestRecord:
    async with streaming_client(url) as client:
        return await send_request(client, request, time.monotonic(), LOST_SECONDS)


@contextmanager
def _hanging_scheduler(pair: Pair) -> Iterator[None]:
    """Stop SGLang's scheduler in the middle of its work, and leave its HTTP server alive.

    A scheduler that last said that it had nothing to do is one that sleeps, not one that hangs. One
    that was stopped while it wrote that down holds a lock that SGLang's HTTP server waits for: it
    goes on, to be stopped elsewhere.
    """
    pids = [pid for pid in _members(pair.server_group) if "scheduler" in _title(pid)]
    assert pids, "no scheduler among SGLang's processes"

    def caught_at_work() -> bool:
        _signal(pids, signal.SIGSTOP)
        with suppress(httpx2.TimeoutException):
            loads = httpx2.get(f"{pair.server_url}{LOADS_PATH}", timeout=5.0, trust_env=False)
            if parse_loads(loads.text).running_requests > 0:
                return True
        _signal(pids, signal.SIGCONT)
        return False

    try:
        wait_until(caught_at_work, "the scheduler had a request to run")
        yield
    finally:
        _signal(pids, signal.SIGCONT)


@contextmanager
def _shared_file_deleted(path: Path) -> Iterator[None]:
    """Delete the file, and put the same one back at the end of the block."""
    aside = path.with_suffix(".aside")
    os.link(path, aside)
    path.unlink()
    try:
        yield
    finally:
        aside.rename(path)


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        os.kill(pid, number)


def _members(group: int) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        with suppress(ValueError, ProcessLookupError, PermissionError):
            if os.getpgid(int(entry.name)) == group:
                yield int(entry.name)


def _title(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return ""


def _reload_nonsense(pair: Pair) -> str:
    good = pair.config.read_text()
    content = yaml.safe_load(good) | {"mode": "automatic"}
    pair.config.write_text(yaml.safe_dump(content))
    answer = httpx2.post(f"{pair.controller_url}/reload", json={}, timeout=20.0, trust_env=False)
    pair.config.write_text(good)
    problem: str = answer.json().get("problem", "")
    return problem
