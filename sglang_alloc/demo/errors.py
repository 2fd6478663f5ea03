"""Errors of the demo and the benches, worded for the person at the terminal."""

from sglang_alloc.errors import AllocError


class ProcessDiedError(AllocError):
    """A process that the demo started ended by itself; the message carries its last log lines."""


class NotReadyError(AllocError):
    """A process that the demo started did not become ready within its time."""


class DemoError(AllocError):
    """The demo cannot go on: a prerequisite is missing or a server answered with an error."""
