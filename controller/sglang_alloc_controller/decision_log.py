"""Control story, after the last step: what was decided and why, as JSON lines that rotate."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from sglang_alloc.errors import ConfigurationError
from sglang_alloc_controller.settings import DecisionLogSettings


class DecisionLog:
    """Appends JSON lines to one file; a full disk costs lines and nothing else."""

    def __init__(self, settings: DecisionLogSettings, count_lost: Callable[[], None]) -> None:
        """Take the settings; `count_lost` is called for every line that could not be written.

        Raises:
            ConfigurationError: the file cannot be opened for writing.
        """
        self._settings = settings
        self._count_lost = count_lost
        self._path = Path(settings.path) if settings.path is not None else None
        self._file = -1
        self._opening = b""
        if self._path is not None:
            try:
                self._open(self._path)
            except OSError as error:
                raise _unwritable(self._path, error.strerror) from error

    def begin(self, record: Mapping[str, object]) -> None:
        """Write what the next lines stand on, now and at the top of each file that follows."""
        self._opening = _line({**record, "continued": True})
        self.write(record)

    def write(self, record: Mapping[str, object]) -> None:
        """Append one line; it is whole or not there, and never raises for the disk's sake."""
        if self._path is None:
            return
        try:
            self._append(self._path, _line(record))
        except OSError:
            self._count_lost()
            self.close()

    def close(self) -> None:
        """Close the file; the next line opens it again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _append(self, path: Path, line: bytes) -> None:
        if self._file < 0:
            self._open(path)
        size = os.fstat(self._file).st_size
        if size and size + len(line) > self._settings.max_bytes:
            self._rotate(path)
            line = self._opening + line
            size = 0
        written = os.write(self._file, line)
        if written < len(line):
            # The disk filled up in the middle: take the half line back.
            os.ftruncate(self._file, size)
            self._count_lost()

    def _rotate(self, path: Path) -> None:
        self.close()
        keep = self._settings.keep_files
        for number in range(keep - 1, 0, -1):
            older = _numbered(path, number)
            if older.exists():
                os.replace(older, _numbered(path, number + 1))
        if keep:
            os.replace(path, _numbered(path, 1))
        else:
            path.unlink()
        self._open(path)

    def _open(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._file = os.open(path, flags, 0o640)


def require_writable(settings: DecisionLogSettings) -> None:
    """Raise a ConfigurationError unless the log can be written; make no file."""
    if settings.path is None:
        return
    path = Path(settings.path)
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC))
    except FileNotFoundError as error:
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise _unwritable(path, f"no file can be made in {path.parent}") from error
    except OSError as error:
        raise _unwritable(path, error.strerror) from error


def _unwritable(path: Path, reason: str | None) -> ConfigurationError:
    return ConfigurationError(
        f"decision_log.path is {path}, which cannot be opened for writing: {reason}. Choose a file "
        "in a folder that this user may write to."
    )


def _line(record: Mapping[str, object]) -> bytes:
    return json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")
