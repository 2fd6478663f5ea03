"""Errors of the commands that start servers, worded for the person at the terminal."""

from sglang_alloc.errors import AllocError


class ProcessDiedError(AllocError):
    """A started process ended by itself; the message carries its last log lines."""


class NotReadyError(AllocError):
    """A started process did not become ready within its time."""


class ServerRunError(AllocError):
    """The command cannot go on: a prerequisite is missing, or a server answered with an error."""
