"""Simulator, the command: a cell is one law on one scenario and seed; finished ones are on disk.

A cell's file names the identity of what was simulated. One of another identity (another plant,
another version of the code) does not count and is simulated again.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sglang_alloc.atomic_file import replace_file
from sglang_alloc.errors import ConfigurationError
from sglang_alloc_controller.simulator.law_names import ONE_PAIR, OURS
from sglang_alloc_controller.simulator.scores import Score
from sglang_alloc_controller.simulator.timeline import Timeline
from sglang_alloc_controller.simulator.world import World

_PACKAGE = Path(__file__).parent.parent
_FILE_MODE = 0o644
# Read by our law only, by the doors or after the simulation; the settings count by their values.
_OURS_ONLY = re.compile(
    r"(law_(?!names)\w+|control_\w+|load_history|settings|cli\w*|replicas|replica_scores|cells|pool|plots|results"
    r"|loop|run|metrics_server|own_metrics|page_\w+|replay|decision_\w+|sglang_\w+|series_fold)\.py"
)


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

    def __init__(self, folder: Path, identity: str, of_others: str | None = None) -> None:
        """Use `folder`/cells for cells of our law of this identity; nothing is written yet.

        `of_others` is the identity that counts for cells of other laws, if it is another one.
        """
        self._folder = folder / "cells"
        self._ours, self._others = identity, of_others or identity

    def load(self, cell: Cell) -> Finished | None:
        """Return a cell that is finished, or None."""
        try:
            found = json.loads(self._path(cell).read_bytes())
            if found["identity"] != self._identity(cell):
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
            "identity": self._identity(finished.cell),
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

    def _identity(self, cell: Cell) -> str:
        return self._ours if cell.law in (OURS, ONE_PAIR) else self._others

    def _path(self, cell: Cell) -> Path:
        name = f"{cell.scenario}.{cell.law}.{cell.seed}.{cell.gain:g}.json"
        return self._folder / name


def identity(world: World) -> str:
    """Return a digest of the plant, the settings and the code that simulates our law."""
    return _digest(world, lambda name: True, lambda key: True)


def identity_of_others(world: World) -> str:
    """Return the same for the laws that are compared with ours, which may go on while ours changes.

    What only our law reads is left out: its modules, and its settings.
    """
    return _digest(world, lambda name: not _OURS_ONLY.fullmatch(name), _is_shared_setting)


def _is_shared_setting(key: str) -> bool:
    return not key.startswith(("load_", "calm_"))


def _digest(world: World, counts: Callable[[str], bool], reads: Callable[[str], bool]) -> str:
    digest = hashlib.sha256()
    settings = world.settings.model_dump()
    # The settings name the bench's path; its content is in the plant.
    settings["quality"].pop("cost_model")
    settings["law"] = {key: value for key, value in settings["law"].items() if reads(key)}
    digest.update(repr((world.plant, world.mix, settings, world.ranges)).encode())
    for source in sorted(_PACKAGE.rglob("*.py")):
        if counts(source.name):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
