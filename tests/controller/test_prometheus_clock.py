"""Prometheus' clock is set back and forward: no old sample counts as a new one."""

from collections.abc import Iterator

import pytest
from clocked_prometheus import (
    LOOKBACK_SECONDS,
    REQUESTS_PER_SECOND,
    SCRAPE_SECONDS,
    ClockedPrometheus,
    clocked_prometheus,
)

from sglang_alloc_controller.law_settings import LawSettings
from sglang_alloc_controller.prometheus_api import PrometheusApi
from sglang_alloc_controller.reading_history import ReadingHistory
from sglang_alloc_controller.samples import InputState, SourceError
from sglang_alloc_controller.settings import FreshnessSettings, SourceSettings

VALID, STALE = InputState.VALID, InputState.STALE
STALE_AFTER_SECONDS = FreshnessSettings().stale_after_seconds


class Reader:
    """Reads once a second, and checks that each reading is of the time that it says."""

    def __init__(self, prometheus: ClockedPrometheus) -> None:
        self.prometheus = prometheus
        settings = SourceSettings(
            kind="prometheus", url=prometheus.url, lookback_seconds=LOOKBACK_SECONDS
        )
        self._source = PrometheusApi(settings, lambda: prometheus.now_seconds)
        self._history = ReadingHistory(LawSettings(), FreshnessSettings())
        self.problems: list[str] = []

    def states(self, seconds: int) -> list[InputState]:
        """Let so many seconds pass; return the state of the input after each of them."""
        return [self._state_a_second_later() for _ in range(seconds)]

    def _state_a_second_later(self) -> InputState:
        self.prometheus.pass_second()
        self.read()
        return self._history.input_state(self.prometheus.now_seconds)

    def read(self) -> None:
        try:
            reading = self._source.read()
        except SourceError as error:
            self.problems.append(str(error))
            return
        restarted = self._history.add(reading, after_failure=False)
        assert not restarted, "old counts were taken for a new life of the engine"
        newest = self._history.newest
        assert newest is not None
        assert newest.taken_at_seconds <= self.prometheus.now_seconds
        answered = REQUESTS_PER_SECOND * newest.taken_at_seconds
        assert newest.event_count("ttft") == pytest.approx(answered, abs=1e-3)

    def close(self) -> None:
        self._source.close()


@pytest.fixture
def reader() -> Iterator[Reader]:
    with clocked_prometheus() as prometheus:
        prometheus.scrape()
        reader = Reader(prometheus)
        assert set(reader.states(30)) == {VALID}
        yield reader
        reader.close()


def test_a_clock_set_back_makes_the_input_stale_until_it_has_passed_the_last_sample(
    reader: Reader,
) -> None:
    """It shows the samples of the last 20 seconds once more meanwhile, as if they were new."""
    reader.prometheus.set_clock(-20.0)
    assert reader.states(20) == [VALID] * 5 + [STALE] * 15
    reader.states(SCRAPE_SECONDS)
    assert set(reader.states(30)) == {VALID}


def test_a_clock_set_back_by_more_than_the_lookback_is_waited_for(reader: Reader) -> None:
    reader.prometheus.set_clock(-1000.0)
    assert reader.states(1000)[-1] is STALE
    assert "has no sglang:num_queue_reqs" in reader.problems[-1]
    reader.states(SCRAPE_SECONDS)
    assert set(reader.states(30)) == {VALID}


def test_a_clock_set_back_while_it_is_asked_counts_no_sample_twice(reader: Reader) -> None:
    _set_while_asked(reader.prometheus, -20.0)
    assert reader.states(20)[-1] is STALE
    reader.states(SCRAPE_SECONDS)
    assert set(reader.states(30)) == {VALID}


@pytest.mark.parametrize("by_seconds", [20.0, 1000.0])
def test_a_clock_set_forward_makes_samples_look_old_until_the_next_scrape(
    reader: Reader, by_seconds: float
) -> None:
    reader.prometheus.set_clock(by_seconds)
    assert set(reader.states(60)) == {VALID}


def test_a_sample_from_the_future_is_refused(reader: Reader) -> None:
    """Its clock was set forward, and it scraped, between the two questions of one reading."""
    _set_while_asked(reader.prometheus, 1000.0)
    assert set(reader.states(30)) == {VALID}
    assert len(reader.problems) == 1
    assert "clock was set forward" in reader.problems[0]


def _set_while_asked(prometheus: ClockedPrometheus, by_seconds: float) -> None:
    def set_clock() -> None:
        prometheus.after_telling_the_time = lambda: None
        prometheus.set_clock(by_seconds)
        prometheus.scrape()

    prometheus.after_telling_the_time = set_clock
