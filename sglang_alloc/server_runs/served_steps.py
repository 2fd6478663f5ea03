"""Server runs: the forwards of a server that was started with a step record, read back."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

_NANOSECONDS = 1e9


class Step(NamedTuple):
    """One forward; `budget` is its own phase's, as it obeyed it."""

    begun_seconds: float
    """Of the monotonic clock, or after the start of a run."""
    phase: str
    budget: int
    tokens: int
    is_calm: bool = False
    """Whether it left no request waiting, while few enough ran."""


def record_of_leading_rank(folder: Path) -> Path:
    """Return the file that the leading rank writes where STEP_RECORD_VARIABLE is `folder`."""
    return folder / "rank0.csv"


def read_steps(path: Path) -> list[Step]:
    """Read the record of one rank (`step_record.py`), also while it is being written."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Step(
                int(row["begun_ns"]) / _NANOSECONDS,
                row["phase"],
                int(row[f"{row['phase']}_budget"]),
                int(row["num_tokens"]),
                row["is_calm"] == "1",
            )
            for row in csv.DictReader(file)
            if row["phase"] in ("prefill", "decode")
        ]
