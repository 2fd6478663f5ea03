"""Offline story, judging: finished points on disk, one line each, so that a run can go on.

The first line says what is being measured. A last line that was cut off by a crash or a full disk
is measured again.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_alloc.errors import ConfigurationError
from sglang_alloc.evaluation.points import Point


class EvaluationJournal:
    """Append-only file of points; `points` are those it holds."""

    def __init__(self, path: Path, identity: Mapping[str, object]) -> None:
        """Open `path`, going on from what is there.

        Raises:
            ConfigurationError: it holds points of another model, table or size, or is no journal.
        """
        self._path = path
        self.points: dict[tuple[str, int], Point] = {}
        header = json.loads(json.dumps({"format": "sglang-alloc evaluate 1", **identity}))
        lines = _whole_lines(path)
        if lines:
            self._require_same(_parsed(path, lines[0]), header)
            for line in lines[1:]:
                self._remember(Point.from_json(_parsed(path, line)))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("r+b" if path.exists() else "wb") as file:
            file.truncate(sum(len(line) + 1 for line in lines))
        if not lines:
            self._write(header)

    def add(self, point: Point) -> None:
        """Keep a point, on disk first.

        Raises:
            ConfigurationError: it cannot be written, for example because the disk is full.
        """
        self._write(point.to_json())
        self._remember(point)

    def _remember(self, point: Point) -> None:
        self.points[point.rule, point.budget] = point

    def _write(self, fields: Mapping[str, Any]) -> None:
        try:
            with self._path.open("ab") as file:
                file.write(json.dumps(fields).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ConfigurationError(
                f"A measured point could not be added to {self._path}: {error.strerror}. Free some "
                "space and run the same command again: it goes on from the last whole point."
            ) from error

    def _require_same(self, found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
        for name in sorted(set(found) | set(asked)):
            if found.get(name) != asked.get(name):
                raise ConfigurationError(
                    f"{self._path} was measured with {name} = {found.get(name)!r}, and "
                    f"{asked.get(name)!r} is asked for now. Choose another output folder, or "
                    "delete that file to start afresh."
                )


def _whole_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def _parsed(path: Path, line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ConfigurationError(
            f"{path} should hold measured points, one JSON object a line, and has {line[:60]!r}. "
            "Choose another output folder, or delete that file."
        )
    return fields
