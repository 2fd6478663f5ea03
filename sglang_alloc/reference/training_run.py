"""Reference model, training: a run that can be left at any step and taken up again."""

import hashlib
import json
import time
from concurrent.futures import Executor
from dataclasses import asdict
from pathlib import Path

import numpy as np

from sglang_alloc.reference.architecture import ReferenceConfig
from sglang_alloc.reference.heldout import heldout_losses, windows_of
from sglang_alloc.reference.model import ReferenceModel, initialise
from sglang_alloc.reference.recipe import Recipe, learning_rate_at, training_windows
from sglang_alloc.reference.token_streams import Streams, TokenStreams
from sglang_alloc.reference.training_state import (
    HistoryRow,
    TrainingState,
    load_training_state,
    save_training_state,
)
from sglang_alloc.reference.training_step import StepResult, build_optimizer, training_step

HELDOUT_WINDOW_TOKENS, HELDOUT_WINDOWS = 512, 8  # per domain, at every saved step


class TrainingRun:
    """The model in training, its optimiser and its loss curve; `step` steps are done."""

    def __init__(
        self,
        config: ReferenceConfig,
        recipe: Recipe,
        streams: TokenStreams,
        path: Path,
        *,
        device: str = "cpu",
    ) -> None:
        """Continue the run saved in `path`, or start one there.

        Raises:
            TrainingStateError: `path` holds a run of another recipe, architecture or corpus.
        """
        self.recipe, self._streams, self._path, self._device = recipe, streams, path, device
        self._identity = run_identity(config, recipe, streams.train)
        self.model = ReferenceModel(config)
        initialise(self.model, recipe.seed)
        self.model.to(device)
        self._optimizer = build_optimizer(self.model, recipe)
        self._heldout = {
            domain: windows_of(tokens, HELDOUT_WINDOW_TOKENS, HELDOUT_WINDOWS).to(device)
            for domain, tokens in streams.heldout.items()
        }
        self.step, self._seconds_before, self._history = 0, 0.0, list[HistoryRow]()
        self._unreported: list[StepResult] = []
        self._continue_saved()
        self._started = time.monotonic()

    def _continue_saved(self) -> None:
        state = load_training_state(self._path, self._identity)
        if state is None:
            return
        self.model.load_state_dict(state.model)
        self._optimizer.load_state_dict(state.optimizer)
        self.step, self._seconds_before = state.step, state.seconds
        self._history = list(state.history)

    @property
    def complete(self) -> bool:
        return self.step >= self.recipe.total_steps

    def advance(self, executor: Executor) -> None:
        """Take one optimiser step."""
        windows = training_windows(self._streams.train, self.recipe, self.step).to(self._device)
        result = training_step(
            self.model, self._optimizer, self.recipe, self.step, windows, executor=executor
        )
        self._unreported.append(result)
        self.step += 1

    def report(self, *, measure_heldout: bool) -> HistoryRow:
        """Add a point to the loss curve: the mean since the last one."""
        losses = [result.loss for result in self._unreported]
        balances = [result.balance_loss for result in self._unreported]
        self._unreported = []
        row = HistoryRow(
            step=self.step,
            tokens=self.recipe.tokens_before(self.step),
            seconds=self._seconds(),
            learning_rate=learning_rate_at(self.recipe, self.step - 1),
            train_loss=float(np.mean(losses)),
            balance_loss=float(np.mean(balances)),
            heldout=heldout_losses(self.model, self._heldout) if measure_heldout else None,
        )
        self._history.append(row)
        return row

    def save(self) -> None:
        """Write the run to its path, atomically."""
        save_training_state(self._path, self.state())

    def state(self) -> TrainingState:
        """The run as it stands; the tensors are the live ones."""
        return TrainingState(
            step=self.step,
            seconds=self._seconds(),
            identity=self._identity,
            model=self.model.state_dict(),
            optimizer=self._optimizer.state_dict(),
            history=self._history,
        )

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started


def run_identity(config: ReferenceConfig, recipe: Recipe, streams: Streams) -> str:
    """Digest of all that decides the weights."""
    digest = hashlib.sha256(json.dumps([asdict(config), asdict(recipe)]).encode())
    for name in sorted(streams):
        digest.update(name.encode() + streams[name].tobytes())
    return digest.hexdigest()
