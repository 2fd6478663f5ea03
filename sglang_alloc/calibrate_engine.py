"""Offline story, calibrating: the text under reduced budgets in a real server, and what it records.

At each anchor the calibration text runs with every layer reduced. The engine records how scores are
spread and finds the gains; the losses tell which reference to take.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sglang_alloc.allocation_mode import Probe
from sglang_alloc.budget_tables import BudgetTables
from sglang_alloc.calibrate_corrections import Matrix, references_of_rows, search_reference
from sglang_alloc.calibrate_thresholds import MeanQuotas, Scores
from sglang_alloc.errors import ConfigurationError
from sglang_alloc.npz_file import read_npz
from sglang_alloc.profile_engine import ProfiledServer
from sglang_alloc.profile_plan import uniform_plan
from sglang_alloc.profile_run import (
    Progress,
    probe_tables,
    require_fit,
    serving_tables,
    windows_of,
)
from sglang_alloc.profile_settings import ProfileJob
from sglang_alloc.profile_windows import Window
from sglang_alloc.sensitivity_file import Sensitivities

# Every fourth window is kept out of the calibration, to see what the thresholds keep there.
HELDOUT_EVERY = 4
# References are searched at every second anchor: neighbouring budgets want the same.
REFERENCE_EVERY = 2


class Row(NamedTuple):
    """One way to run the text: a phase's quotas at an anchor, with these corrections."""

    phase: int  # 0 decode, 1 prefill
    anchor: int
    reference: int
    finds_gain: bool
    heldout: bool = False  # recorded apart from the text that is calibrated on


class AnchorRecord(NamedTuple):
    """What one phase's run at one anchor gave."""

    scores: Scores
    heldout_scores: Scores
    gains: Matrix  # (L,)
    losses: Matrix  # (W,) of the calibration windows, nats per token
    uncorrected: Matrix | None  # the same without gains and references, where it was measured
    referenced: Matrix | None  # the same without gains


class Records(NamedTuple):
    """All runs: (phases, anchors) records, and decode's k2 of every budget (N,)."""

    anchors: list[list[AnchorRecord]]
    references: list[int]


def record_anchors(
    job: ProfileJob,
    sensitivities: Sensitivities,
    means: Sequence[MeanQuotas],
    anchors: Sequence[int],
    progress: Progress,
    *,
    corrections: bool,
) -> Records:
    """Run the text at every anchor of each phase; without `corrections` k2 is K and gains are 1.

    Raises:
        ConfigurationError: the text does not do, or the engine recorded nothing.
        ProfileError, ProcessDiedError: the engine failed.
    """
    require_fit(job)
    top_k = sensitivities.top_k
    rows = _rows(len(means), len(anchors), top_k, corrections)
    tables = _tables(job, sensitivities, means, anchors, rows)
    probe = Probe("threshold", "gains" if corrections else None)
    with serving_tables(job, tables, probe, progress) as server:
        for old in (*job.folder.glob("scores-*.npz"), *job.folder.glob("gains-*.npz")):
            old.unlink()
        run = _Run(job, server, rows, split_windows(windows_of(job, server, None)), progress)
        chosen = run.references(len(anchors), top_k) if corrections else {}
        places = [anchors[place] for place in chosen] or [anchors[-1]]
        budgets = len(means[0].quotas)
        references = references_of_rows(budgets, places, list(chosen.values()) or [top_k], top_k)
        at = [references[anchor] for anchor in anchors]
        run.thresholds([[*at], *([[top_k] * len(anchors)] * (len(means) - 1))])
        server.set_probe(len(rows))  # writes the last record
    # In the order of the phases and anchors.
    return Records(run.records(), references)


def split_windows(windows: Sequence[Window]) -> tuple[Sequence[Window], Sequence[Window]]:
    """Return the windows to calibrate on, and every fourth one, which is held out."""
    heldout = list(windows[HELDOUT_EVERY - 1 :: HELDOUT_EVERY])
    if not heldout:
        raise ConfigurationError(
            f"Calibrating needs at least {HELDOUT_EVERY} windows, one of them held out; --windows "
            f"is {len(windows)}."
        )
    return [w for i, w in enumerate(windows) if i % HELDOUT_EVERY != HELDOUT_EVERY - 1], heldout


def _rows(phases: int, anchors: int, top_k: int, corrections: bool) -> list[Row]:
    candidates = range(max(top_k // 2, 1), top_k + 1) if corrections else [top_k]
    rows = []
    for anchor in range(anchors):
        for reference in candidates:
            if corrections:
                rows.append(Row(0, anchor, reference, False))
            rows += [Row(0, anchor, reference, corrections, heldout) for heldout in (False, True)]
        for phase in range(1, phases):
            rows += [Row(phase, anchor, top_k, corrections, heldout) for heldout in (False, True)]
    return rows


def _tables(
    job: ProfileJob,
    sensitivities: Sensitivities,
    means: Sequence[MeanQuotas],
    anchors: Sequence[int],
    rows: Sequence[Row],
) -> BudgetTables:
    quotas = np.stack([means[row.phase].quotas[anchors[row.anchor]] for row in rows])
    layers, top_k = quotas.shape[1], sensitivities.top_k
    full = Row(0, len(anchors) - 1, top_k, False)
    each = [*rows, full]
    return probe_tables(
        job,
        uniform_plan(layers, top_k, quotas),
        sensitivities.saliency,
        references=np.repeat([[row.reference] for row in each], layers, axis=1).astype(np.int16),
        gains=np.repeat([[0.0 if row.finds_gain else 1.0] for row in each], layers, axis=1),
    )


class _Run:
    """A ready server, and what was measured so far."""

    def __init__(
        self,
        job: ProfileJob,
        server: ProfiledServer,
        rows: Sequence[Row],
        windows: tuple[Sequence[Window], Sequence[Window]],
        progress: Progress,
    ) -> None:
        self._job, self._server, self._progress = job, server, progress
        self._number = {row: number for number, row in enumerate(rows)}
        self._windows = windows  # to calibrate on, and held out
        self._losses: dict[Row, Matrix] = {}
        self._left = 0

    def references(self, anchors: int, top_k: int) -> dict[int, int]:
        """Return k2 by anchor, of every second anchor below the full one."""
        places = range(0, anchors - 1, REFERENCE_EVERY)
        most = top_k - max(top_k // 2, 1) + 1
        self._stage("references", len(places) * most * self._tokens(False))
        found = {}
        for anchor in places:
            row = Row(0, anchor, top_k, False)
            found[anchor] = search_reference(top_k, partial(self._referenced, row))
        return found

    def _referenced(self, row: Row, reference: int) -> Matrix:
        return self._measured(row._replace(reference=reference))

    def thresholds(self, references: Sequence[Sequence[int]]) -> None:
        """Run every phase and anchor under its reference, which also finds the gains."""
        count = sum(map(len, references))
        self._stage("thresholds", count * (self._tokens(False) + self._tokens(True)))
        self._final = [
            [self._final_row(phase, anchor, k2) for anchor, k2 in enumerate(of_phase)]
            for phase, of_phase in enumerate(references)
        ]
        for of_phase in self._final:
            for row in of_phase:
                self._measured(row)
                self._measured(row._replace(heldout=True))

    def records(self) -> list[list[AnchorRecord]]:
        """Return what was recorded, once the server has written all of it."""
        return [[self._record(row) for row in of_phase] for of_phase in self._final]

    def _final_row(self, phase: int, anchor: int, reference: int) -> Row:
        row = Row(phase, anchor, reference, True)
        return row if row in self._number else row._replace(finds_gain=False)

    def _record(self, row: Row) -> AnchorRecord:
        number = self._number[row]
        gains = self._job.folder / f"gains-{number + 1}.npz"
        layers = len(self._job.model.layer_ids)
        plain = row._replace(finds_gain=False)
        top_k = self._job.model.identity.top_k
        found = np.ones(layers)
        if row.finds_gain:
            found = read_npz(_existing(gains), "gains")["gains"]
        return AnchorRecord(
            self._scores(row),
            self._scores(row._replace(heldout=True)),
            found,
            self._losses[row],
            self._losses.get(plain._replace(reference=top_k)),
            self._losses.get(plain),
        )

    def _scores(self, row: Row) -> Scores:
        path = self._job.folder / f"scores-{self._number[row] + 1}.npz"
        record = read_npz(_existing(path), "counts of scores")
        return Scores(record["counts"], record["tokens"])

    def _measured(self, row: Row) -> Matrix:
        if row not in self._losses:
            self._losses[row] = self._measure(row)
        return self._losses[row]

    def _measure(self, row: Row) -> Matrix:
        windows, size = self._windows[row.heldout], self._job.settings.chunk_windows
        self._server.set_probe(self._number[row])
        self._server.flush()
        losses: list[float] = []
        for start in range(0, len(windows), size):
            scored = self._server.whole_losses(windows[start : start + size])
            losses += scored.losses
            self._left -= scored.forward_tokens
            self._progress.advance(scored.forward_tokens, self._left)
        return np.array(losses)

    def _stage(self, name: str, tokens: int) -> None:
        self._left = tokens
        self._progress.stage(name, tokens)

    def _tokens(self, heldout: bool) -> int:
        return sum(len(w.prefix) + len(w.continuation) for w in self._windows[heldout])


def _existing(path: Path) -> Path:
    if not path.exists():
        raise ConfigurationError(
            f"The engine recorded nothing at {path}: is the folder shared with the machine that "
            "serves?"
        )
    return path
