"""Offline story, profiling: what has been measured, one line each, so that a run can go on.

The first line is the identity of the run. A last line without its line feed was cut off by a crash
or a full disk and is dropped; the others are never changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from sglang_alloc.errors import ConfigurationError

FORMAT = "sglang-alloc profile 1"


class Entry(NamedTuple):
    """Mean losses of one chunk of windows under one probe, in nats per token."""

    series: str  # for example "layer:decode"
    probe: int
    chunk: int
    losses: tuple[float, ...]
    forward_tokens: int


class ProfileJournal:
    """Append-only file of finished measurements."""

    def __init__(self, path: Path, identity: Mapping[str, object]) -> None:
        """Open `path`, going on from what is there.

        Raises:
            ConfigurationError: it belongs to another model, text or setting, which is named, or
                it is no journal.
        """
        self.path = path
        self.entries: dict[tuple[str, int, int], Entry] = {}
        self._pins: dict[str, str] = {}
        header = {"format": FORMAT, **identity}
        lines = self._whole_lines(path)
        if lines:
            _require_same(path, _parsed(path, lines[0]), header)
            for line in lines[1:]:
                fields = _parsed(path, line)
                if "pin" in fields:
                    self._pins[fields["pin"]] = fields["value"]
                    continue
                self._remember(Entry(**{**fields, "losses": tuple(fields["losses"])}))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("r+b" if path.exists() else "w+b")
        # What follows the last whole line is half of one.
        self._file.truncate(sum(len(line) + 1 for line in lines))
        self._file.seek(0, os.SEEK_END)
        if not lines:
            self._write(header)

    def __enter__(self) -> ProfileJournal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def pin(self, name: str, value: str) -> None:
        """Note a fact of the run that was not known at its start, or compare it with the note.

        Raises:
            ConfigurationError: it was another one before, or it cannot be written.
        """
        if name in self._pins:
            _require_same(self.path, {name: self._pins[name]}, {name: value})
            return
        self._write({"pin": name, "value": value})
        self._pins[name] = value

    def pinned(self, name: str) -> str | None:
        """Return the note of that name, None if there is none."""
        return self._pins.get(name)

    def find(self, series: str, probe: int, chunk: int) -> Entry | None:
        """Return what was measured there, None if nothing was."""
        return self.entries.get((series, probe, chunk))

    def add(self, entry: Entry) -> None:
        """Write one measurement; it is on the disk when this returns.

        Raises:
            ConfigurationError: it cannot be written.
        """
        self._write(entry._asdict())
        self._remember(entry)

    def _remember(self, entry: Entry) -> None:
        self.entries[entry.series, entry.probe, entry.chunk] = entry

    def _write(self, fields: Mapping[str, object]) -> None:
        try:
            self._file.write(json.dumps(fields, allow_nan=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ConfigurationError(
                f"The profile's journal {self.path} cannot be written: {error.strerror}. Make "
                "room and run the same command again: it goes on from the last whole line."
            ) from error

    @staticmethod
    def _whole_lines(path: Path) -> list[bytes]:
        if not path.exists():
            return []
        try:
            return path.read_bytes().split(b"\n")[:-1]
        except OSError as error:
            raise ConfigurationError(
                f"The profile's journal {path} cannot be read: {error.strerror}."
            ) from error


def _parsed(path: Path, line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ConfigurationError(
            f"{path} is not a journal of `sglang-alloc profile`: a line begins with {line[:40]!r}. "
            "Move it away, or choose another output."
        )
    return fields


def _require_same(path: Path, found: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    wanted = json.loads(json.dumps(wanted))  # as it was written: tuples are lists
    different = [
        f"{name} was {found.get(name)!r} and is now {wanted.get(name)!r}"
        for name in sorted({*found, *wanted})
        if found.get(name) != wanted.get(name)
    ]
    if different:
        raise ConfigurationError(
            f"{path} holds a profile of something else: {'; '.join(different)}. Give another "
            "output, or remove the journal to begin anew."
        )
