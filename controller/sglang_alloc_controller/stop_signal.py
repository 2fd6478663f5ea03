"""Control story, between ticks: a sleep that signals end, without a lock that they could block on.

An Event set in a signal handler can deadlock, when the signal interrupts the very wait on it.
"""

import os
import select
import signal
from collections.abc import Callable

_STOPPING = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """SIGTERM and SIGINT as the end of a sleep; SIGHUP as a call. One for a process."""

    def __init__(self) -> None:
        """Take the signals; a SIGHUP does nothing until it is told what to call."""
        self._stopping = False
        self._on_hangup: Callable[[], None] = lambda: None
        self._ears, self._mouth = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in _STOPPING:
            signal.signal(number, lambda *_: self._stop())
        signal.signal(signal.SIGHUP, lambda *_: self._on_hangup())

    def call_on_hangup(self, on_hangup: Callable[[], None]) -> None:
        """Call this at a SIGHUP; it runs in a signal handler and must only set a flag."""
        self._on_hangup = on_hangup

    def sleep(self, seconds: float) -> bool:
        """Sleep for `seconds` or until told to stop; return whether to stop."""
        if not self._stopping:
            select.select([self._ears], [], [], seconds)
        return self._stopping

    def _stop(self) -> None:
        self._stopping = True
        os.write(self._mouth, b".")
