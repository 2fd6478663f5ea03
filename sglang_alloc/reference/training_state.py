"""Reference model, training: save and resume a run, so that an interruption costs no quality."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sglang_alloc.errors import AllocError


class TrainingStateError(AllocError):
    """The saved run cannot be continued with what was asked for now."""


class HistoryRow(NamedTuple):
    """One point of the loss curve; held-out losses are None where they were not measured."""

    step: int
    tokens: int
    seconds: float
    learning_rate: float
    train_loss: float
    balance_loss: float
    heldout: dict[str, float] | None


class TrainingState(NamedTuple):
    """A run after `step` steps; `identity` says which run it is."""

    step: int
    seconds: float
    identity: str
    model: dict[str, Any]
    optimizer: dict[str, Any]
    history: list[HistoryRow]


def save_training_state(path: Path, state: TrainingState) -> None:
    """Write atomically: a reader, or a crash, finds the old state or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    plain = {**state._asdict(), "history": [tuple(row) for row in state.history]}
    with temporary.open("wb") as file:
        torch.save(plain, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_training_state(path: Path, identity: str) -> TrainingState | None:
    """Return the saved run, or None when there is none; raise when it is another run."""
    if not path.exists():
        return None
    plain = torch.load(path, map_location="cpu", weights_only=True)
    state = TrainingState(**{**plain, "history": [HistoryRow(*row) for row in plain["history"]]})
    if state.identity != identity:
        raise TrainingStateError(
            f"asked to continue {path.name}, found a run with another recipe, architecture or "
            "corpus in it; start afresh with --restart or choose another --work folder"
        )
    return state
