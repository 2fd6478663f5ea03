"""Control story, after the last step: what was decided and why, as JSON lines that rotate."""

import contextlib
import json
import os
import stat
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
        self._path = _log_path(settings)
        self._file = -1
        self._opening = b""
        if self._path is not None:
            try:
                self._open(self._path)
            except OSError as error:
                raise _unwritable(self._path, error.strerror) from error

    def begin(self, record: Mapping[str, object]) -> None:
        """Write what the next lines stand on, now and at the top of each file that follows."""
        self._opening = b""
        self.write(record)
        self._opening = _line({**record, "continued": True})

    def write(self, record: Mapping[str, object]) -> None:
        """Append one line; it is whole or not there, and what it costs is never a tick."""
        if self._path is None:
            return
        try:
            self._append(self._path, _line(record))
        except (OSError, ValueError):  # ValueError: a number that JSON does not have
            self._count_lost()
            self.close()

    def close(self) -> None:
        """Close the file; the next line opens it again."""
        file, self._file = self._file, -1
        if file >= 0:
            with contextlib.suppress(OSError):
                os.close(file)

    def _append(self, path: Path, line: bytes) -> None:
        if self._file >= 0 and not _is_at(self._file, path):
            self.close()  # somebody moved or deleted it
        if self._file < 0:
            self._open(path)
        size = os.fstat(self._file).st_size
        if size and size + len(line) > self._settings.max_bytes:
            self._rotate(path)
            size = 0
        if size == 0 and stat.S_ISREG(os.fstat(self._file).st_mode):
            line = self._opening + line
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
        # A pipe that nobody reads must not block control; a file does not care.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        self._file = os.open(path, flags, 0o640)
        if _ends_within_a_line(self._file, path):
            os.write(self._file, b"\n")


def _log_path(settings: DecisionLogSettings) -> Path | None:
    """Return the path of the log; of a symbolic link that of its file, which can be renamed."""
    if settings.path is None:
        return None
    path = Path(settings.path)
    return path.resolve() if path.is_file() else path


def require_writable(settings: DecisionLogSettings) -> None:
    """Raise a ConfigurationError unless the log can be written; make no file."""
    if settings.path is None:
        return
    path = Path(settings.path)
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK))
    except FileNotFoundError as error:
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise _unwritable(path, f"no file can be made in {path.parent}") from error
    except OSError as error:
        raise _unwritable(path, error.strerror) from error


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _ends_within_a_line(file: int, path: Path) -> bool:
    """Tell whether whoever wrote last was ended in the middle of a line."""
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_size == 0:
        return False
    with contextlib.suppress(OSError), path.open("rb") as written:
        written.seek(-1, os.SEEK_END)
        return written.read(1) != b"\n"
    return False


def _unwritable(path: Path, reason: str | None) -> ConfigurationError:
    return ConfigurationError(
        f"decision_log.path is {path}, which cannot be opened for writing: {reason}. Choose a file "
        "in a folder that this user may write to."
    )


def _line(record: Mapping[str, object]) -> bytes:
    return json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")
