"""Reading over HTTP ends in time and says what went wrong, whatever the other side does.

The other side is a stand-in, because a real server cannot be asked to hang, drip or break off.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from stand_in_server import StandInServer, free_port, serving

from sglang_alloc_controller.http_fetch import HttpFetcher, StatusError
from sglang_alloc_controller.prometheus_api import PrometheusApi
from sglang_alloc_controller.samples import SourceError
from sglang_alloc_controller.settings import SourceSettings
from sglang_alloc_controller.sglang_metrics import SGLangMetrics

LIMIT_SECONDS = 2.0  # short against what a slow server does, long against a busy test machine
PATIENCE_SECONDS = 30.0  # where nothing is slow on purpose


@pytest.fixture
def server(recorded: Path) -> Iterator[StandInServer]:
    with serving((recorded / "burst.txt").read_text()) as server:
        yield server


@pytest.fixture
def source(server: StandInServer) -> Iterator[SGLangMetrics]:
    with _reading(server, PATIENCE_SECONDS) as source:
        yield source


@contextmanager
def _reading(server: StandInServer, limit_seconds: float) -> Iterator[SGLangMetrics]:
    settings = SourceSettings(url=server.url, timeout_seconds=limit_seconds)
    source = SGLangMetrics(settings, time.monotonic)
    try:
        yield source
    finally:
        source.close()


def test_a_healthy_page_becomes_a_reading_of_now(source: SGLangMetrics) -> None:
    before = time.monotonic()
    reading = source.read()
    assert reading.queue_requests == 20
    assert before <= reading.taken_at_seconds <= time.monotonic()


@pytest.mark.parametrize("fault", ["hang", "drip", "drip headers"])
def test_a_server_that_is_too_slow_is_given_up(server: StandInServer, fault: str) -> None:
    server.fault = fault
    with _reading(server, LIMIT_SECONDS) as source:
        with pytest.raises(SourceError, match=r"did not answer within 2\.0 s"):
            source.read()
        server.fault = "none"
        assert source.read().queue_requests == 20


def test_an_error_status_is_told_with_what_came(
    server: StandInServer, source: SGLangMetrics
) -> None:
    server.fault, server.page = "error", "Internal Server Error"
    with pytest.raises(SourceError, match="status 500: 'Internal Server Error'"):
        source.read()


def test_garbage_is_no_metrics_page(server: StandInServer, source: SGLangMetrics) -> None:
    server.fault = "garbage"
    with pytest.raises(SourceError, match="hold no sglang:num_queue_reqs"):
        source.read()


def test_a_broken_connection_is_an_error_and_the_next_read_works(
    server: StandInServer, source: SGLangMetrics
) -> None:
    server.fault = "cut"
    with pytest.raises(SourceError, match="Cannot read http"):
        source.read()
    server.fault = "none"
    assert source.read().queue_requests == 20


@pytest.mark.parametrize(
    ("source_class", "remedy"),
    [
        (SGLangMetrics, "Start SGLang with --enable-metrics, or correct source.url."),
        (PrometheusApi, "Start Prometheus, or correct source.url"),
    ],
)
def test_where_nobody_listens_the_error_says_what_to_start(
    source_class: type[SGLangMetrics | PrometheusApi], remedy: str
) -> None:
    settings = SourceSettings(url=f"http://127.0.0.1:{free_port()}")
    source = source_class(settings, time.monotonic)
    with pytest.raises(SourceError, match="Connection refused") as refused:
        source.read()
    assert remedy in str(refused.value)
    source.close()


def test_a_page_that_is_not_there_is_told_with_what_to_do(server: StandInServer) -> None:
    """So SGLang answers for /metrics without --enable-metrics."""
    server.loads = None
    fetcher = HttpFetcher(PATIENCE_SECONDS, 100_000, time.monotonic, "Look elsewhere.")
    with pytest.raises(StatusError, match=r"status 404: .*\. Look elsewhere\.$"):
        fetcher.get_text(f"{server.url}/v1/loads")
    fetcher.close()


def test_an_endless_page_is_given_up(server: StandInServer) -> None:
    fetcher = HttpFetcher(PATIENCE_SECONDS, 1000, time.monotonic, "")
    with pytest.raises(SourceError, match="over 1000 bytes"):
        fetcher.get_text(f"{server.url}/metrics")
    fetcher.close()
