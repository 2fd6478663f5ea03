"""Both command lines, around every command: standard output and error that may be odd or broken."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator

# sysexits.h: an error on input or output. Other codes have meanings of their own.
EXIT_OUTPUT_FAILED = 74
_OUTPUT_ERRORS = frozenset(
    {errno.EBADF, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EPIPE}
)


@contextlib.contextmanager
def tolerant_streams(command: str) -> Iterator[None]:
    """Run a command whose output may be closed, full, or unable to say some characters.

    What is closed is opened on nothing, so that no file of ours takes its number and gets the
    output. Characters that the encoding lacks are escaped. Output that cannot be written ends the
    process with one sentence on standard error and status 74, and a reader that has gone away
    without a word.
    """
    _open_what_is_closed()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        # An error that names a file is of that file.
        if error.filename is not None or error.errno not in _OUTPUT_ERRORS:
            raise
        _give_up(command, error)


def _open_what_is_closed() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    while null <= 2:
        os.set_inheritable(null, True)
        null = os.open(os.devnull, os.O_RDWR)
    os.close(null)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)


def _give_up(command: str, error: OSError) -> None:
    # What is still buffered goes nowhere, instead of into another error at the exit.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
    if error.errno != errno.EPIPE:
        with contextlib.suppress(OSError):
            print(f"{command}: its output cannot be written: {error.strerror}.", file=sys.stderr)
    sys.exit(EXIT_OUTPUT_FAILED)
