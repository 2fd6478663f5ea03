"""Offline story, profiling: what has been measured, so that a run can go on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from sglang_alloc.json_lines import JsonLines

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
        self._lines = JsonLines(path, {"format": FORMAT, **identity}, "a profile")
        for fields in self._lines.entries:
            if "pin" in fields:
                self._pins[fields["pin"]] = fields["value"]
                continue
            self._remember(Entry(**{**fields, "losses": tuple(fields["losses"])}))

    def pin(self, name: str, value: str) -> None:
        """Note a fact of the run that was not known at its start, or compare it with the note.

        Raises:
            ConfigurationError: it was another one before, or it cannot be written.
        """
        if name in self._pins:
            self._lines.require_same({name: self._pins[name]}, {name: value})
            return
        self._lines.append({"pin": name, "value": value})
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
        self._lines.append(entry._asdict())
        self._remember(entry)

    def _remember(self, entry: Entry) -> None:
        self.entries[entry.series, entry.probe, entry.chunk] = entry
