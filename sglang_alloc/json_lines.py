"""Offline story: what has been measured, one line of JSON each, so that a run can go on.

The first line is the identity of the run; until something is measured another run may take its
place. A last line without its line feed was cut off by a crash
or a full disk and is dropped; the others are never changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_alloc.errors import ConfigurationError


class JsonLines:
    """Append-only file of one run's measurements, each a JSON object."""

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, object],
        what: str,
        *,
        allow_nan: bool = False,
    ) -> None:
        """Open `path`, going on from what is there; `what` it holds, for messages: "a profile".

        Raises:
            ConfigurationError: it belongs to a run of another identity, whose difference is named,
                it is no such file, or it cannot be written.
        """
        self.path = path
        self._what = what
        self._allow_nan = allow_nan
        lines = self._whole_lines()
        found = [self._parsed(line) for line in lines]
        if len(found) == 1 and found[0].get("format") == identity.get("format"):
            lines, found = [], []  # a run that measured nothing binds nobody
        if found:
            self.require_same(found[0], identity)
        self.entries = found[1:]  # what was there already, in order
        self._keep(sum(len(line) + 1 for line in lines))
        if not found:
            self.append(identity)

    def append(self, fields: Mapping[str, object]) -> None:
        """Write one measurement; it is on the disk when this returns.

        Raises:
            ConfigurationError: it cannot be written.
            ValueError: a field is NaN, where it may not be.
        """
        line = json.dumps(fields, allow_nan=self._allow_nan).encode() + b"\n"
        try:
            with self.path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error

    def require_same(self, found: Mapping[str, object], wanted: Mapping[str, object]) -> None:
        """Raise ConfigurationError, naming each difference, when a fact of the run is another."""
        wanted = json.loads(json.dumps(wanted))  # as it was written: tuples are lists
        different = [
            f"{name} was {found.get(name)!r} and is now {wanted.get(name)!r}"
            for name in sorted({*found, *wanted})
            if found.get(name) != wanted.get(name)
        ]
        if different:
            raise ConfigurationError(
                f"{self.path} holds {self._what} of something else: {'; '.join(different)}. Give "
                "another output, or remove that file to begin anew."
            )

    def _whole_lines(self) -> list[bytes]:
        if not self.path.exists():
            return []
        try:
            return self.path.read_bytes().split(b"\n")[:-1]
        except OSError as error:
            raise ConfigurationError(
                f"{self.path}, the journal of {self._what}, cannot be read: {error.strerror}."
            ) from error

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            fields = json.loads(line)
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            raise ConfigurationError(
                f"{self.path} is not a journal of {self._what}: a line begins with {line[:40]!r}. "
                "Move it away, or choose another output."
            )
        return fields

    def _keep(self, size: int) -> None:
        """Cut off what follows the last whole line: half of one."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.truncate(size)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> ConfigurationError:
        return ConfigurationError(
            f"{self.path}, the journal of {self._what}, cannot be written: {error.strerror}. Make "
            "room and run the same command again: it goes on from the last whole line."
        )
