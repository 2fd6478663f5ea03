"""The controller's own HTTP server: metrics, probes and nothing else."""

from collections.abc import Iterator

import httpx2
import pytest

from sglang_alloc.errors import ConfigurationError
from sglang_alloc_controller.metrics_server import Health, MetricsServer
from sglang_alloc_controller.own_metrics import OwnMetrics
from sglang_alloc_controller.settings import HttpSettings, SloSettings

SLO = SloSettings(ttft_seconds=1.0, itl_seconds=None)


class Served:
    """A running server whose health the test decides."""

    def __init__(self) -> None:
        self.health = Health(True, "Fine.")
        self.metrics = OwnMetrics("control", SLO)
        self.server = MetricsServer(
            HttpSettings(port=0), self.metrics.text, lambda: self.health, lambda: self.health
        )
        self.server.start()

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
        "ticks_total",
        "tick_errors_total",
        "source_failures_total",
        "engine_restarts_total",
        "decision_log_errors_total",
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
    assert httpx2.post(url, timeout=10).status_code == 501


def test_it_listens_on_loopback_unless_told_otherwise() -> None:
    assert HttpSettings().host == "127.0.0.1"


def test_a_port_in_use_is_refused_with_its_number(served: Served) -> None:
    settings = HttpSettings(port=served.server.port)
    with pytest.raises(ConfigurationError, match=rf"http\.port {served.server.port}: Address"):
        MetricsServer(settings, lambda: b"", lambda: served.health, lambda: served.health)
