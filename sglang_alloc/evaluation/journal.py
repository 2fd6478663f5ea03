"""Offline story, judging: finished points on disk, so that a run can go on."""

from collections.abc import Mapping
from pathlib import Path

from sglang_alloc.evaluation.points import Point
from sglang_alloc.json_lines import JsonLines

FORMAT = "sglang-alloc evaluate 1"


class EvaluationJournal:
    """Append-only file of points; `points` are those it holds."""

    def __init__(self, path: Path, identity: Mapping[str, object]) -> None:
        """Open `path`, going on from what is there.

        Raises:
            ConfigurationError: it holds points of another model, table or size, or is no journal.
        """
        self.points: dict[tuple[str, int], Point] = {}
        header = {"format": FORMAT, **identity}
        # What no sample could measure is NaN.
        self._lines = JsonLines(path, header, "an evaluation", allow_nan=True)
        for fields in self._lines.entries:
            self._remember(Point.from_json(fields))

    def add(self, point: Point) -> None:
        """Keep a point, on disk first.

        Raises:
            ConfigurationError: it cannot be written, for example because the disk is full.
        """
        self._lines.append(point.to_json())
        self._remember(point)

    def _remember(self, point: Point) -> None:
        self.points[point.rule, point.budget] = point
