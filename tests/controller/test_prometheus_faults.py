"""A controller on a real Prometheus that is paused, killed, scrapes twice, or scrapes nonsense."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from controller_process import ControllerProcess, running, write_config
from prometheus_process import PrometheusProcess, scraping
from stand_in_server import StandInServer, serving
from virtual_loop import publish_table

from sglang_alloc.shared_table import SharedTable

pytestmark = pytest.mark.server

RECORDED = Path(__file__).parent / "recorded"
CALM, BURST = ((RECORDED / f"{name}.txt").read_text() for name in ("first", "burst"))
QUEUE_LINE = next(line for line in BURST.splitlines() if line.startswith("sglang:num_queue_reqs"))
FULL, FLOOR = (48, 48), 24


class Pair(NamedTuple):
    """A controller on a Prometheus that scrapes one server under two jobs."""

    server: StandInServer
    prometheus: PrometheusProcess
    controller: ControllerProcess
    table: SharedTable

    def lower(self) -> None:
        """Bring the controller to give up quality."""
        self.server.page = CALM
        self.controller.wait_for(lambda: self.controller.is_in_state("valid"), "valid input")
        self.server.page = BURST
        self.controller.wait_for(lambda: max(self.table.selector()[1:]) < 48, "a lower budget")
        assert min(self.table.selector()[1:]) >= FLOOR

    def wait_until_blind(self, problem: str) -> None:
        """Wait until the input is stale for this reason, and full quality is in force."""
        self.controller.wait_for(lambda: self.controller.is_in_state("stale"), "stale input")
        self.controller.wait_for(lambda: self.table.selector()[1:] == FULL, "full quality")
        points = self.controller.get("/history.json").json()["points"]
        assert any(problem in (point["error"] or "") for point in points)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("prometheus")
    publish_table(folder / "t.tbl")
    with (
        serving(CALM) as server,
        scraping(folder, sglang=server.port, again=server.port) as prometheus,
        SharedTable.open(folder / "t.tbl") as table,
    ):
        source = {
            "kind": "prometheus",
            "url": prometheus.url,
            "poll_seconds": 0.2,
            "timeout_seconds": 2.0,
            "lookback_seconds": 6.0,
        }
        freshness = {
            "stale_after_seconds": 5.0,
            "hold_seconds": 0.5,
            "ramp_seconds": 1.0,
            "warmup_seconds": 0.0,
            "idle_after_seconds": 60.0,
        }
        quality = {"prefill_floor_budget": FLOOR, "decode_floor_budget": FLOOR}
        config = write_config(
            folder, prometheus.url, source=source, freshness=freshness, quality=quality
        )
        with running(config) as controller:
            yield Pair(server, prometheus, controller, table)


def test_a_server_that_is_scraped_twice_has_no_longer_queue(pair: Pair) -> None:
    pair.lower()
    pair.controller.wait_for(lambda: pair.controller.value("queue_requests") > 0, "the queue")
    assert pair.controller.value("queue_requests") == 20


@pytest.mark.parametrize(
    "page", [BURST.replace(QUEUE_LINE, ""), BURST.replace(QUEUE_LINE, QUEUE_LINE[:-4] + "NaN")]
)
def test_a_gauge_that_vanishes_or_turns_nan_is_named_and_leads_to_full_quality(
    pair: Pair, page: str
) -> None:
    pair.lower()
    pair.server.page = page
    pair.wait_until_blind("Prometheus has no sglang:num_queue_reqs")


def test_a_prometheus_that_hangs_leads_to_full_quality_and_is_waited_for(pair: Pair) -> None:
    pair.lower()
    pair.prometheus.pause()
    pair.wait_until_blind("did not answer within 2.0 s")
    pair.prometheus.resume()
    pair.lower()


def test_a_prometheus_that_is_killed_leads_to_full_quality_and_is_waited_for(pair: Pair) -> None:
    pair.lower()
    pair.prometheus.kill()
    pair.wait_until_blind("Cannot read http://127.0.0.1:")
    pair.prometheus.start()
    pair.lower()
    assert pair.controller.value("tick_errors_total") == 0
