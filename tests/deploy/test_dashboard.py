"""The dashboard is what its code says, asks what an operator asks, and never shows an empty panel.

Here a small HTTP server stands in for the live pair: it serves what a real SGLang once served and
what the real exporting classes print (pair_exposition). The live pair has its own test.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path

import pytest
from dashboard import build_dashboard, dashboard_json
from pair_exposition import controller_text, sglang_text, underscored, worker_text
from panel_queries import panel_queries
from prometheus_files import DASHBOARD, RULE_FILES
from prometheus_server import running_prometheus

Exposition = Callable[[int], str]


def test_committed_dashboard_is_what_the_code_builds() -> None:
    assert DASHBOARD.read_text(encoding="utf-8") == dashboard_json(build_dashboard()), (
        "run `python deploy/grafana/dashboard.py`"
    )


def test_rows_tell_the_story_from_slo_to_controller() -> None:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["SLOs", "Load", "Budget", "Worker", "Controller"]
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_every_panel_is_explained_and_uses_the_chosen_data_source() -> None:
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        if panel["type"] != "row":
            assert panel["description"], panel["title"]
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert panel["targets"], panel["title"]


def test_variables_are_data_source_job_and_instance() -> None:
    variables = json.loads(DASHBOARD.read_text(encoding="utf-8"))["templating"]["list"]
    assert [variable["name"] for variable in variables] == ["datasource", "job", "instance"]


def test_variables_are_filled_in_before_a_query_is_run(tmp_path: Path) -> None:
    target = {"refId": "A", "expr": 'rate(x{job=~"$job",a="${instance:regex}"}[$__rate_interval])'}
    row = {"title": "row", "panels": [{"title": "nested", "targets": [target]}]}
    path = tmp_path / "dashboard.json"
    path.write_text(json.dumps({"panels": [row]}))
    variables = {"job": "serving", "instance": "a", "__rate_interval": "1m"}
    assert [q.expression for q in panel_queries(path, variables)] == [
        'rate(x{job=~"serving",a="a"}[1m])'
    ]
    with pytest.raises(ValueError, match=r"'nested' uses \$instance, which has no value"):
        panel_queries(path, {"job": "serving", "__rate_interval": "1m"})


def test_every_query_of_every_panel_returns_data(prometheus: str, tmp_path: Path) -> None:
    queries = panel_queries(DASHBOARD)
    with (
        _exporter(lambda scrape: sglang_text(scrape) + worker_text()) as new_spelling,
        _exporter(lambda scrape: underscored(sglang_text(scrape)) + worker_text()) as old_spelling,
        _exporter(lambda scrape: controller_text(ticks=scrape)) as controller,
        running_prometheus(
            prometheus,
            tmp_path,
            {"serving": [new_spelling, old_spelling], "controller": [controller]},
            RULE_FILES,
        ) as server,
    ):
        assert server.wait_until_none_is_empty(queries, timeout_seconds=120) == []
        running = server.query("sglang_alloc:running_requests")
        assert {series["metric"]["instance"] for series in running} == {new_spelling, old_spelling}
    assert len(queries) > 25


@contextmanager
def _exporter(exposition: Exposition) -> Iterator[str]:
    """Serve `exposition(n)` to the n-th scrape; yield host:port."""
    scrapes = count(1)

    class Request(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = exposition(next(scrapes)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Scrapes are no news."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Request)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
