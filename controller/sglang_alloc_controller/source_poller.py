"""Control story, first step: a thread reads the metrics, so that a hanging server stops no tick."""

import threading
from typing import NamedTuple

import structlog

from sglang_alloc_controller.samples import MetricsSource, Reading, SourceError

_log = structlog.get_logger("sglang_alloc_controller")


class Observation(NamedTuple):
    """The newest reading and how reading goes."""

    reading: Reading | None
    failures_total: int
    error: str | None
    """What went wrong last, if the last try failed."""


class SourcePoller:
    """Reads a source again and again in a thread of its own and keeps the newest reading."""

    def __init__(self, source: MetricsSource, poll_seconds: float) -> None:
        """Take the source, which it closes in the end."""
        self._source = source
        self._poll_seconds = poll_seconds
        self._stopped = threading.Event()
        self._thread = self._new_thread()
        self._observation = Observation(None, 0, None)

    def start(self) -> None:
        """Start reading."""
        self._thread.start()

    def latest(self) -> Observation:
        """Return the newest observation; one reference is swapped, so it is whole.

        A thread that a fault of ours has ended is replaced, its traceback is in the log: without
        one the controller would be blind and not say why.
        """
        started = self._thread.ident is not None
        if started and not self._thread.is_alive() and not self._stopped.is_set():
            self._count_failure("Reading ended by a fault of the controller (see its log).")
            self._thread = self._new_thread()
            self._thread.start()
        return self._observation

    def stop(self, wait_seconds: float) -> None:
        """Stop reading; a read that hangs is left to die with the process."""
        self._stopped.set()
        self._thread.join(wait_seconds)

    def poll_once(self) -> None:
        """Read once and keep the outcome."""
        try:
            reading = self._source.read()
        except SourceError as error:
            self._count_failure(str(error))
            return
        self._observation = Observation(reading, self._observation.failures_total, None)

    def _count_failure(self, sentence: str) -> None:
        failures_total = self._observation.failures_total + 1
        self._observation = self._observation._replace(
            failures_total=failures_total, error=sentence
        )

    def _new_thread(self) -> threading.Thread:
        return threading.Thread(target=self._run, name="source-poller", daemon=True)

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                self.poll_once()
                self._stopped.wait(self._poll_seconds)
        except Exception:
            # Logged here: Python would write it past the log, and wait for whoever reads that.
            _log.exception("reading_ended")
            return
        self._source.close()
