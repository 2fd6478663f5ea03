"""Control story, first step: a thread reads the metrics, so that a hanging server stops no tick."""

import threading
from typing import NamedTuple

from sglang_alloc_controller.samples import MetricsSource, Reading, SourceError


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
        self._thread = threading.Thread(target=self._run, name="source-poller", daemon=True)
        self._observation = Observation(None, 0, None)

    def start(self) -> None:
        """Start reading."""
        self._thread.start()

    def latest(self) -> Observation:
        """Return the newest observation; one reference is swapped, so it is whole."""
        return self._observation

    def stop(self, wait_seconds: float) -> None:
        """Stop reading; a read that hangs is left to die with the process."""
        self._stopped.set()
        self._thread.join(wait_seconds)

    def poll_once(self) -> None:
        """Read once and keep the outcome."""
        last = self._observation
        try:
            reading = self._source.read()
        except SourceError as error:
            self._observation = last._replace(
                failures_total=last.failures_total + 1, error=str(error)
            )
            return
        self._observation = Observation(reading, last.failures_total, None)

    def _run(self) -> None:
        while not self._stopped.is_set():
            self.poll_once()
            self._stopped.wait(self._poll_seconds)
        self._source.close()
