"""A real Prometheus scrapes recorded SGLang metrics: its API gives the same reading."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from controller_process import call, running, write_config
from prometheus_process import scraping
from stand_in_server import StandInServer, serving
from virtual_loop import publish_table
from waiting import wait_until

from sglang_alloc.shared_table import SharedTable
from sglang_alloc_controller.prometheus_api import PrometheusApi
from sglang_alloc_controller.samples import Reading, SourceError
from sglang_alloc_controller.settings import SourceSettings
from sglang_alloc_controller.sglang_metrics import SGLangMetrics

pytestmark = pytest.mark.server


@pytest.fixture
def server(recorded: Path) -> Iterator[StandInServer]:
    with serving((recorded / "burst.txt").read_text()) as server:
        yield server


@pytest.fixture
def prometheus(tmp_path: Path, server: StandInServer) -> Iterator[str]:
    """The address of a Prometheus that scrapes the server once a second."""
    with scraping(tmp_path, sglang=server.port) as process:
        yield process.url


def _settings(url: str, **fields: object) -> SourceSettings:
    return SourceSettings(kind="prometheus", url=url, selector='job="sglang"', **fields)


def _reading_or_none(source: PrometheusApi) -> Reading | None:
    with contextlib.suppress(SourceError):
        return source.read()
    return None


def _problem_or_none(source: PrometheusApi) -> SourceError | None:
    try:
        source.read()
    except SourceError as error:
        return error
    return None


def _is_ready(prometheus: str) -> bool:
    try:
        return httpx2.get(f"{prometheus}/-/ready", timeout=5).status_code == 200
    except httpx2.TransportError:
        return False


def _first_reading(source: PrometheusApi) -> Reading:
    found = wait_until(lambda: _reading_or_none(source), "a reading")
    assert found is not None
    return found


def test_the_api_gives_the_same_reading_as_the_server_itself(
    server: StandInServer, prometheus: str
) -> None:
    source = PrometheusApi(_settings(prometheus), time.monotonic)
    direct = SGLangMetrics(SourceSettings(url=server.url), time.monotonic)
    found, expected = _first_reading(source), direct.read()
    source.close()
    direct.close()
    assert found.queue_requests == expected.queue_requests == 20
    assert found.running_requests == expected.running_requests
    for slo in ("ttft", "itl"):
        assert list(found.series(slo).values()) == list(expected.series(slo).values())
        assert found.edges[slo] == expected.edges[slo]


def test_a_reading_is_as_old_as_its_scrape(server: StandInServer, prometheus: str) -> None:
    source = PrometheusApi(_settings(prometheus), time.monotonic)
    began = time.monotonic()
    wait_until(
        lambda: _first_reading(source).taken_at_seconds >= began, "a reading of a later scrape"
    )
    server.fault = "error"
    scraped = server.requests
    wait_until(lambda: server.requests >= scraped + 3, "three failed scrapes")
    frozen = source.read()
    wait_until(lambda: server.requests >= scraped + 5, "two more")
    again = source.read()
    source.close()
    assert again.taken_at_seconds == pytest.approx(frozen.taken_at_seconds, abs=0.5)


def test_after_the_lookback_a_dead_target_is_no_reading(
    server: StandInServer, prometheus: str
) -> None:
    source = PrometheusApi(_settings(prometheus, lookback_seconds=3.0), time.monotonic)
    _first_reading(source)
    server.fault = "error"
    problem = wait_until(lambda: _problem_or_none(source), "no reading")
    source.close()
    assert "has no sglang:num_queue_reqs" in str(problem)


def test_a_selector_that_is_no_promql_is_told(prometheus: str) -> None:
    settings = _settings(prometheus).model_copy(update={"selector": "job="})
    source = PrometheusApi(settings, time.monotonic)
    wait_until(lambda: _is_ready(prometheus), "Prometheus is ready")
    with pytest.raises(SourceError, match="status 400"):
        source.read()
    source.close()


def test_a_controller_on_prometheus_answers_a_burst(
    tmp_path: Path, server: StandInServer, prometheus: str
) -> None:
    publish_table(tmp_path / "t.tbl")
    table = SharedTable.open(tmp_path / "t.tbl")
    config = write_config(
        tmp_path,
        prometheus,
        source={"kind": "prometheus", "url": prometheus, "poll_seconds": 0.5},
        freshness={"warmup_seconds": 0.0},
    )
    with running(config) as controller:
        controller.wait_for(lambda: controller.is_in_state("valid"), "valid input")
        controller.wait_for(lambda: max(table.selector()[1:]) < 48, "a lower budget")
        checked = call("check", "--config", str(config))
        assert checked.returncode == 0, checked.stdout
