"""The reading thread: the newest reading stays at hand whatever the source does."""

import threading

import structlog
from structlog.testing import capture_logs
from waiting import wait_until

from sglang_alloc_controller.samples import Reading, SourceError
from sglang_alloc_controller.source_poller import SourcePoller


class Source:
    """A source that does what the test says next."""

    def __init__(self) -> None:
        self.error: str | None = None
        self.fault: Exception | None = None
        self.count = 0
        self.read_once = threading.Event()
        self.blocked: threading.Event | None = None
        self.closed = threading.Event()

    def read(self) -> Reading:
        self.read_once.set()
        if self.blocked is not None:
            self.blocked.wait(30)
        if self.fault is not None:
            raise self.fault
        if self.error is not None:
            raise SourceError(self.error)
        self.count += 1
        return Reading(float(self.count), {}, {}, 0.0, 0.0)

    def close(self) -> None:
        self.closed.set()


def test_failures_keep_the_last_reading_and_are_counted() -> None:
    source = Source()
    poller = SourcePoller(source, 1.0)
    assert poller.latest().reading is None
    poller.poll_once()
    source.error = "away"
    poller.poll_once()
    poller.poll_once()
    observation = poller.latest()
    assert observation.reading is not None
    assert observation.reading.taken_at_seconds == 1.0
    assert (observation.failures_total, observation.error) == (2, "away")


def test_a_reading_ends_the_error_and_keeps_the_count() -> None:
    source = Source()
    poller = SourcePoller(source, 1.0)
    source.error = "away"
    poller.poll_once()
    source.error = None
    poller.poll_once()
    assert poller.latest().error is None
    assert poller.latest().failures_total == 1


def test_a_read_that_hangs_blocks_neither_looking_nor_stopping() -> None:
    source = Source()
    source.blocked = threading.Event()
    poller = SourcePoller(source, 0.01)
    poller.start()
    assert source.read_once.wait(10)
    assert poller.latest().reading is None
    poller.stop(0.05)
    assert not source.closed.is_set()
    source.blocked.set()
    assert source.closed.wait(10)


def test_the_thread_reads_until_it_is_stopped_and_closes_the_source() -> None:
    source = Source()
    poller = SourcePoller(source, 0.001)
    poller.start()
    wait_until(lambda: source.count >= 5, "five readings")
    poller.stop(10.0)
    assert source.closed.is_set()


def test_a_thread_that_a_fault_of_ours_ended_is_told_and_replaced() -> None:
    source = Source()
    source.fault = ZeroDivisionError()
    poller = SourcePoller(source, 0.001)
    structlog.reset_defaults()  # the fixture that silences logs puts them back afterwards
    with capture_logs() as logs:
        poller.start()
        assert source.read_once.wait(10)
        error = wait_until(lambda: poller.latest().error, "an error")
    assert logs[0]["event"] == "reading_ended"
    assert "fault of the controller" in error
    source.fault = None
    wait_until(lambda: poller.latest().error is None, "a reading again")
    assert poller.latest().reading is not None
    poller.stop(10.0)
    assert source.closed.is_set()
