"""The controller's own HTTP server: pages for anybody, orders for whoever is permitted."""

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest
from waiting import wait_until

from sglang_alloc.errors import ConfigurationError
from sglang_alloc_controller.http_permit import TOKEN_VARIABLE, Permit
from sglang_alloc_controller.metrics_server import (
    METRICS_TYPE,
    Answer,
    Health,
    MetricsServer,
    Page,
    Routes,
)
from sglang_alloc_controller.own_metrics import OwnMetrics
from sglang_alloc_controller.settings import ControlSettings, HttpSettings, SloSettings

SLO = SloSettings(ttft_seconds=1.0, itl_seconds=None)


def _order(body: bytes, length: bytes | None = None) -> bytes:
    head = b"POST /order HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %b\r\n\r\n" % (length or b"%d" % len(body)) + body


class Served:
    """A running server whose health the test decides."""

    def __init__(self, host: str = "127.0.0.1", **permit: Any) -> None:
        self.health = Health(True, "Fine.")
        self.metrics = OwnMetrics("control", SLO)
        self.ordered: list[Mapping[str, Any]] = []
        pages: dict[str, Page] = {
            "/metrics": lambda query: Answer(200, METRICS_TYPE, self.metrics.text()),
            "/livez": lambda query: self.health.answer(),
            "/readyz": lambda query: self.health.answer(),
        }
        rule = Permit(host, permit.get("control", ControlSettings()), permit.get("env", {}))
        routes = Routes(pages, {"/order": self._obey}, rule.refusal)
        self.server = MetricsServer(HttpSettings(port=0), routes)
        self.server.start()

    def _obey(self, content: Mapping[str, Any]) -> Answer:
        if content.get("impossible"):
            raise ConfigurationError("That cannot be.")
        if content.get("faulty"):
            raise KeyError("a fault of ours")
        self.ordered.append(content)
        return Answer.of_json(200, {"ok": True})

    def post(self, json: Any = None, **arguments: Any) -> httpx2.Response:
        url = f"http://127.0.0.1:{self.server.port}/order"
        return httpx2.post(url, json=json, timeout=10, **arguments)

    def connected(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.server.port), timeout=10)

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(f"http://127.0.0.1:{self.server.port}{path}", timeout=10)


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.server.stop()


def test_metrics_are_prometheus_text(served: Served) -> None:
    answer = served.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'sglang_alloc_controller_mode{mode="control"} 1.0' in answer.text


def test_every_counter_is_there_before_its_first_event(served: Served) -> None:
    text = served.get("/metrics").text
    for name in (
        'budget_changes_total{direction="down",phase="prefill"}',
        'calm_budget_changes_total{direction="up",phase="decode"}',
        'calm_budget_reversals_total{phase="decode"}',
        "ticks_total",
        "tick_errors_total",
        "source_failures_total",
        "engine_restarts_total",
        "decision_log_errors_total",
        "log_lines_lost_total",
    ):
        assert f"sglang_alloc_controller_{name} 0.0" in text
    assert "_created" not in text


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_probes_answer_with_the_health(served: Served, path: str) -> None:
    answer = served.get(path)
    assert (answer.status_code, answer.text) == (200, "Fine.\n")
    served.health = Health(False, "Stuck.")
    answer = served.get(path)
    assert (answer.status_code, answer.text) == (503, "Stuck.\n")


def test_other_paths_and_methods_are_refused(served: Served) -> None:
    assert served.get("/").status_code == 404
    url = f"http://127.0.0.1:{served.server.port}/metrics"
    assert httpx2.post(url, timeout=10).status_code == 404
    assert httpx2.put(url, timeout=10).status_code == 501


@pytest.mark.parametrize("path", ["/metrics", "/livez", "/none"])
def test_head_is_answered_like_get_without_the_body(served: Served, path: str) -> None:
    url = f"http://127.0.0.1:{served.server.port}{path}"
    got, head = served.get(path), httpx2.head(url, timeout=10)
    assert (head.status_code, head.content) == (got.status_code, b"")
    assert head.headers["content-length"] == got.headers["content-length"]


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET http://[ HTTP/1.0\r\n\r\n", b"404"),
        (b"POST http://[ HTTP/1.0\r\n\r\n", b"404"),
        (b"GET /metrics?" + b"&" * 2000 + b"&a=%ff HTTP/1.0\r\n\r\n", b"200"),
        (_order(b"", length=b"9" * 5000), b"413"),
        (_order(b"", length=b"-1"), b"413"),
        (_order(b"[" * 4000), b"400"),
        (_order(b'{"n": ' + b"9" * 4000 + b"}" * 2), b"400"),
        (_order(b"{}", length=b"0002"), b"200"),
    ],
)
def test_whatever_is_sent_is_answered_and_costs_no_traceback(
    served: Served,
    capfd: pytest.CaptureFixture[str],
    request_bytes: bytes,
    status: bytes,
) -> None:
    with served.connected() as client:
        client.sendall(request_bytes)
        assert client.recv(4096).split()[1] == status
    assert capfd.readouterr().err == ""


def test_a_page_that_fails_by_a_fault_of_ours_is_answered(
    served: Served, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.metrics, "text", lambda: 1 / 0)
    answer = served.get("/metrics")
    assert (answer.status_code, "traceback" in answer.text) == (500, True)
    assert capfd.readouterr().err == ""


def test_a_client_that_goes_away_is_no_news(
    served: Served, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(5):
        with served.connected() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
    assert served.get("/livez").status_code == 200
    assert capfd.readouterr().err == ""


def test_slow_clients_keep_no_probe_out_and_hold_few_threads(served: Served) -> None:
    with contextlib.ExitStack() as slow:
        clients = [slow.enter_context(served.connected()) for _ in range(80)]
        for client in clients:
            with contextlib.suppress(OSError):  # those that came first are out by now
                client.sendall(b"G")
        assert served.get("/livez").status_code == 200
        wait_until(lambda: threading.active_count() < 70, "the end of threads")
        assert clients[0].recv(1) == b""


def test_it_listens_on_loopback_unless_told_otherwise() -> None:
    assert HttpSettings().host == "127.0.0.1"


def test_it_starts_without_a_name_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(name: str = "") -> str:
        raise AssertionError(f"asked for the name of {name!r}")

    monkeypatch.setattr(socket, "getfqdn", ask)
    server = MetricsServer(HttpSettings(port=0), Routes({}, {}, lambda header: None))
    server.start()
    assert server.port > 0
    server.stop()


def test_an_ipv6_address_is_taken_for_one() -> None:
    if not Path("/proc/net/if_inet6").exists():
        with pytest.raises(ConfigurationError, match="family not supported by protocol"):
            MetricsServer(HttpSettings(host="::1", port=0), Routes({}, {}, lambda header: None))
        return
    server = MetricsServer(HttpSettings(host="::1", port=0), Routes({}, {}, lambda header: None))
    server.start()
    assert httpx2.get(f"http://[::1]:{server.port}/", timeout=10).status_code == 404
    server.stop()


def test_a_port_in_use_is_refused_with_its_number(served: Served) -> None:
    settings = HttpSettings(port=served.server.port)
    with pytest.raises(ConfigurationError, match=rf"http\.port {served.server.port}: Address"):
        MetricsServer(settings, Routes({}, {}, lambda header: None))


def test_on_loopback_an_order_needs_no_token(served: Served) -> None:
    assert served.post({"a": 1}).json() == {"ok": True}
    assert served.ordered == [{"a": 1}]


def test_an_order_that_cannot_be_obeyed_says_why(served: Served) -> None:
    answer = served.post({"impossible": True})
    assert (answer.status_code, answer.json()["problem"]) == (409, "That cannot be.")


def test_an_order_that_fails_by_a_fault_of_ours_is_answered(served: Served) -> None:
    answer = served.post({"faulty": True})
    assert answer.status_code == 500
    assert "KeyError" in answer.json()["problem"]


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ({"data": {"a": "1"}}, 415),  # a form, as a foreign web page could send it
        ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 400),
        ({"json": [1]}, 400),
        ({"json": {"long": "x" * 5000}}, 413),
        ({"json": {}, "headers": {"Host": "evil.example:80"}}, 403),  # DNS rebinding
    ],
)
def test_a_malformed_order_is_refused(
    served: Served, arguments: dict[str, Any], status: int
) -> None:
    assert served.post(**arguments).status_code == status
    assert served.ordered == []


def test_beyond_loopback_orders_need_a_token_to_be_configured() -> None:
    served = Served("0.0.0.0")
    answer = served.post({})
    served.server.stop()
    assert answer.status_code == 403
    assert "control.token_file" in answer.json()["problem"]
    assert served.ordered == []


@pytest.mark.parametrize("source", ["file", "environment"])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_with_a_token_only_the_token_counts(tmp_path: Path, source: str, host: str) -> None:
    (tmp_path / "token").write_text("0123456789abcdef\n")
    control = ControlSettings(token_file=str(tmp_path / "token") if source == "file" else None)
    env = {TOKEN_VARIABLE: "0123456789abcdef"} if source == "environment" else {}
    served = Served(host, control=control, env=env)
    statuses = [
        served.post({}, headers=headers).status_code
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "0123456789abcdef"},
            {"Authorization": "Bearer 0123456789abcdef"},
        )
    ]
    served.server.stop()
    assert statuses == [401, 401, 401, 200]
    assert len(served.ordered) == 1


def test_a_replaced_token_counts_at_once_and_a_lost_one_opens_nothing(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("0123456789abcdef")
    served = Served(control=ControlSettings(token_file=str(file)))
    file.write_text("fedcba9876543210")
    headers = {"Authorization": "Bearer fedcba9876543210"}
    replaced = served.post({}, headers=headers).status_code
    file.unlink()
    lost = served.post({}, headers=headers).status_code
    served.server.stop()
    assert (replaced, lost) == (200, 503)


@pytest.mark.parametrize("token", ["", "short"])
def test_a_token_that_can_be_guessed_is_refused_at_the_start(tmp_path: Path, token: str) -> None:
    (tmp_path / "token").write_text(token)
    with pytest.raises(ConfigurationError, match="at least 16"):
        Permit("0.0.0.0", ControlSettings(token_file=str(tmp_path / "token")), {})
