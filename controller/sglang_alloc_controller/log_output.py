"""Control story, beside every step: log lines on standard error, whatever becomes of its other end.

A full disk, a reader that has gone away and one that does not read must cost the lines and not the
control loop.
"""

import os
import select
import threading

# A pipe that is ready takes this many bytes without blocking (POSIX).
_ATOMIC_BYTES = select.PIPE_BUF


class LogOutput:
    """The last link of structlog's chain; a line that cannot be written is dropped."""

    def __init__(self, descriptor: int) -> None:
        """Take an open file descriptor, which stays open and as blocking as it is.

        Nothing is buffered, so that a lost line is lost at once and not tried again at exit. The
        descriptor is not made non-blocking, because whoever started this process shares it.
        """
        self._descriptor = descriptor
        self._ready = select.poll()
        self._ready.register(descriptor, select.POLLOUT)
        # Threads that found it ready together would fill it together.
        self._lock = threading.Lock()
        self._cut_short = False
        self.lost_lines = 0
        """Lines that were dropped or cut short since the start."""

    def msg(self, message: str) -> None:
        """Write one line, or as much of it as goes out at once."""
        line = f"{message}\n".encode("utf-8", errors="replace")
        with self._lock:
            rest = memoryview(b"\n" + line if self._cut_short else line)
            size = len(rest)
            try:
                while rest and self._ready.poll(0):
                    rest = rest[os.write(self._descriptor, rest[:_ATOMIC_BYTES]) :]
            except OSError:
                pass
            if not rest:
                self._cut_short = False
            else:
                self.lost_lines += 1
                self._cut_short = self._cut_short or len(rest) < size

    debug = info = warning = error = critical = msg
