"""Simulator, the command: a cell is one law on one scenario and seed; finished ones are on disk.

A cell's file names the identity of what was simulated. One of another identity (another plant,
another version of the code) does not count and is simulated again.
"""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from sglang_alloc.atomic_file import replace_file
from sglang_alloc.errors import ConfigurationError
from sglang_alloc_controller.simulator.scores import Score
from sglang_alloc_controller.simulator.timeline import Timeline
from sglang_alloc_controller.simulator.world import World

_PACKAGE = Path(__file__).parent.parent
_FILE_MODE = 0o644


class Cell(NamedTuple):
    """What is simulated at once."""

    scenario: str
    law: str
    seed: int
    gain: float = 1.0
    """How much more than the bench says the budget changes the step times."""


class Finished(NamedTuple):
    """A cell and what came of it."""

    cell: Cell
    score: Score
    timeline: Timeline


class CellStore:
    """The finished cells of an output folder."""

    def __init__(self, folder: Path, identity: str) -> None:
        """Use `folder`/cells for cells of this identity; nothing is written yet."""
        self._folder, self._identity = folder / "cells", identity

    def load(self, cell: Cell) -> Finished | None:
        """Return a cell that is finished, or None."""
        try:
            found = json.loads(self._path(cell).read_bytes())
            if found["identity"] != self._identity:
                return None
            return Finished(
                cell,
                Score(*(math.nan if one is None else one for one in found["score"])),
                Timeline(**found["timeline"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None  # not there, or cut off: it is simulated again

    def save(self, finished: Finished) -> None:
        """Keep a cell, in one step.

        Raises:
            ConfigurationError: the folder cannot be written.
        """
        content: dict[str, Any] = {
            "identity": self._identity,
            "cell": finished.cell._asdict(),
            "score": [one if math.isfinite(one) else None for one in finished.score],
            "timeline": finished.timeline._asdict(),
        }
        path = self._path(finished.cell)
        try:
            replace_file(path, json.dumps(content).encode(), mode=_FILE_MODE)
        except OSError as error:
            raise ConfigurationError(
                f"The result {path} cannot be written: {error.strerror}. Free some space or choose "
                "another --out, and run the same command again: what is finished is kept."
            ) from error

    def _path(self, cell: Cell) -> Path:
        name = f"{cell.scenario}.{cell.law}.{cell.seed}.{cell.gain:g}.json"
        return self._folder / name


def identity(world: World) -> str:
    """Return a digest of the plant, the settings and the code that simulates."""
    digest = hashlib.sha256()
    # The settings name the bench's path; its content is in the plant.
    settings = re.sub(r"'cost_model': [^,}]*", "", str(world.settings.model_dump()))
    digest.update(repr((world.plant, world.mix, settings, world.ranges)).encode())
    for source in sorted(_PACKAGE.rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
