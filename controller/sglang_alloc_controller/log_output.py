"""Control story, beside every step: log lines on standard error, whatever becomes of its other end.

A full disk or a reader that has gone away must cost the lines and not the control loop.
"""

import os


class LogOutput:
    """The last link of structlog's chain; a line that cannot be written is dropped."""

    def __init__(self, descriptor: int) -> None:
        """Take an open file descriptor, which stays open.

        Nothing is buffered, so that a lost line is lost at once and not tried again at exit.
        """
        self._descriptor = descriptor

    def msg(self, message: str) -> None:
        """Write one line, or as much of it as fits."""
        try:
            os.write(self._descriptor, f"{message}\n".encode("utf-8", errors="replace"))
        except OSError:
            return

    debug = info = warning = error = critical = msg
