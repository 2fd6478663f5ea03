"""A real controller's trouble reaches a person: a real Prometheus, our rules, its notifications."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from controller_process import ControllerProcess, running, write_config
from prometheus_files import RULES_FOLDER
from prometheus_server import running_prometheus
from stand_in_server import serving
from virtual_loop import publish_table
from waiting import wait_until

pytestmark = pytest.mark.server

Alert = dict[str, Any]
_CALM = "sglang_alloc_controller_kill_switch 0.0"


class Pager:
    """What Prometheus tells its Alertmanager, the newest last.

    It stands in for Debian's Alertmanager, which does not start without files outside its folder.
    What that one would add is a person's routes; rules, labels and texts are Prometheus' work.
    """

    def __init__(self) -> None:
        self.alerts: list[Alert] = []
        told = self.alerts

        class Receiver(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                told.extend(json.loads(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Receiver)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def of(self, name: str, *, resolved: bool = False) -> list[Alert]:
        """Return what was told of an alert: that it fires, or that it has ended."""
        now = datetime.now(UTC)
        return [
            alert
            for alert in list(self.alerts)
            if alert["labels"]["alertname"] == name
            and (datetime.fromisoformat(alert["endsAt"]) <= now) is resolved
        ]


@contextmanager
def _pager() -> Iterator[Pager]:
    pager = Pager()
    try:
        yield pager
    finally:
        pager.server.shutdown()
        pager.server.server_close()


def _impatient_rules(folder: Path) -> Path:
    """The alerts as they are shipped, without their `for`: promtool's tests hold the durations."""
    content = yaml.safe_load((RULES_FOLDER / "alerts.rules.yaml").read_text(encoding="utf-8"))
    for group in content["groups"]:
        for rule in group["rules"]:
            rule.pop("for", None)
    path = folder / "alerts.rules.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def _write(config: Path, **sections: object) -> None:
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | sections))


@contextmanager
def _controller(folder: Path, page: str) -> Iterator[tuple[ControllerProcess, Path, str]]:
    publish_table(folder / "t.tbl")
    with serving(page) as server:
        config = write_config(folder, server.url)
        address = f"127.0.0.1:{yaml.safe_load(config.read_text())['http']['port']}"
        with running(config) as controller:
            controller.wait_for(lambda: controller.has(_CALM), "its first tick")
            yield controller, config, address


def test_a_refused_configuration_and_a_kill_switch_page_a_person_until_they_are_mended(
    recorded: Path, tmp_path: Path
) -> None:
    prometheus = shutil.which("prometheus")
    assert prometheus, "This test needs a Prometheus server: apt-get install -y prometheus"
    refused, killed = "SglangAllocConfigRefused", "SglangAllocKillSwitchLeftOn"
    with (
        _pager() as pager,
        _controller(tmp_path, (recorded / "first.txt").read_text()) as (
            controller,
            config,
            address,
        ),
        running_prometheus(
            prometheus,
            tmp_path,
            {"controller": [address]},
            [_impatient_rules(tmp_path)],
            scrape_seconds=1,
            alertmanager=f"127.0.0.1:{pager.server.server_port}",
        ) as server,
    ):
        wait_until(lambda: bool(server.numbers("up == 1")), "a scrape")
        assert pager.of(refused) == pager.of(killed) == []
        good = yaml.safe_load(config.read_text())["slo"]
        _write(config, slo={"ttft_seconds": -1.0})
        assert controller.order("/reload").status_code == 409
        assert controller.order("/killswitch", on=True, actor="alice").status_code == 200
        for name in (refused, killed):
            wait_until(lambda name=name: bool(pager.of(name)), f"{name} fires")
        (alert, *_) = pager.of(refused)
        assert alert["labels"] | {"instance": address, "severity": "warning"} == alert["labels"]
        assert address in alert["annotations"]["summary"]
        assert alert["annotations"]["runbook_url"].endswith("#sglangallocconfigrefused")
        _write(config, slo=good)
        assert controller.order("/reload").status_code == 200
        assert controller.order("/killswitch", on=False).status_code == 200
        for name in (refused, killed):
            wait_until(lambda name=name: bool(pager.of(name, resolved=True)), f"{name} ends")
