"""A real Prometheus for the length of a test: `with running_prometheus(...) as server: ...`.

It serves the fixture-level tests here and the live ones that scrape a real server and controller.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from panel_queries import PanelQuery
from waiting import wait_until

POLL_SECONDS = 0.25
EVALUATION_SECONDS = 1


class Prometheus(NamedTuple):
    """A running server; `url` is its base address."""

    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the series of an instant query, as the API gives them."""
        question = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{question}", timeout=10) as answer:
            content: dict[str, Any] = json.load(answer)
        series: list[dict[str, Any]] = content["data"]["result"]
        return series

    def numbers(self, expression: str) -> list[float]:
        """Return the values of an instant query that are numbers (no NaN, no infinity)."""
        values = (float(series["value"][1]) for series in self.query(expression))
        return [value for value in values if math.isfinite(value)]

    def empty(self, queries: Iterable[PanelQuery]) -> list[PanelQuery]:
        """Return the queries that give no number."""
        return [query for query in queries if not self.numbers(query.expression)]

    def wait_until_none_is_empty(
        self, queries: Sequence[PanelQuery], timeout_seconds: float
    ) -> list[PanelQuery]:
        """Poll until every query gives a number; return those that never did."""
        deadline = time.monotonic() + timeout_seconds
        remaining = self.empty(queries)
        while remaining and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            remaining = self.empty(remaining)
        return remaining


@contextmanager
def running_prometheus(
    binary: str,
    folder: Path,
    targets: Mapping[str, Sequence[str]],
    rule_files: Iterable[Path] = (),
    scrape_seconds: int = 3,
    *,
    alertmanager: str | None = None,
) -> Iterator[Prometheus]:
    """Start Prometheus in `folder`, scraping `targets` (job -> host:port list); stop it after.

    scrape_seconds is also how long a target may take to answer: a busy machine needs seconds.
    Alerts go to the Alertmanager at that host:port, if any.

    Raises AssertionError with its log when it does not become ready.
    """
    config, log = folder / "prometheus.yml", folder / "prometheus.log"
    content = _config(targets, rule_files, scrape_seconds)
    if alertmanager is not None:
        static = [{"static_configs": [{"targets": [alertmanager]}]}]
        content["alerting"] = {"alertmanagers": static}
    config.write_text(yaml.safe_dump(content))
    port = _free_port()
    command = [
        binary,
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        server = Prometheus(f"http://127.0.0.1:{port}")
        _wait_until_ready(server, process, log)
        yield server
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


def _config(
    targets: Mapping[str, Sequence[str]], rule_files: Iterable[Path], scrape_seconds: int
) -> dict[str, Any]:
    return {
        "global": {
            "scrape_interval": f"{scrape_seconds}s",
            "scrape_timeout": f"{scrape_seconds}s",
            "evaluation_interval": f"{EVALUATION_SECONDS}s",
        },
        "rule_files": [str(path) for path in rule_files],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": list(addresses)}]}
            for job, addresses in targets.items()
        ],
    }


def _wait_until_ready(server: Prometheus, process: subprocess.Popen[bytes], log: Path) -> None:
    def is_ready() -> bool:
        assert process.poll() is None, f"Prometheus ended:\n{log.read_text()}"
        try:
            with urllib.request.urlopen(f"{server.url}/-/ready", timeout=1):
                return True
        except OSError:
            return False

    wait_until(is_ready, "Prometheus is ready", explain=log.read_text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
