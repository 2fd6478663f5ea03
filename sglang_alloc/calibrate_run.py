"""Offline story, calibrating: complete budget tables out of sensitivities, by a real server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from sglang_alloc.allocation_mode import PROBE_NOTE
from sglang_alloc.budget_tables import BudgetTables
from sglang_alloc.calibrate_thresholds import (
    Matrix,
    MeanQuotas,
    Scores,
    anchor_rows,
    heldout_errors,
    solve_mean_quotas,
    thresholds_of,
)
from sglang_alloc.errors import ConfigurationError, ModelMismatchError
from sglang_alloc.profile_plan import uniform_plan
from sglang_alloc.profile_run import Progress, run_whole, serving, windows_of
from sglang_alloc.profile_settings import ProfileJob
from sglang_alloc.profile_windows import Window
from sglang_alloc.sensitivity_file import Sensitivities
from sglang_alloc.solve_bounds import QuotaBounds
from sglang_alloc.solve_tables import solved_tables

ANCHORS = 13
# Every fourth window is kept out of the calibration, to see what the thresholds keep there.
HELDOUT_EVERY = 4


class Calibration(NamedTuple):
    """Complete tables, and the largest relative error of the activations on held-out text."""

    tables: BudgetTables
    heldout_error: float | None


def run_calibration(
    job: ProfileJob,
    sensitivities: Sensitivities,
    bounds: QuotaBounds,
    progress: Progress,
    *,
    anchor_count: int = ANCHORS,
) -> Calibration:
    """Solve the sensitivities, and find the thresholds if they were profiled for them.

    The text is run at `anchor_count` budgets of each phase.

    Raises:
        ModelMismatchError: the sensitivities are another model's.
        ConfigurationError: they are nobody's, or the text does not do.
        ProfileError, ProcessDiedError: the engine failed.
    """
    _require_same_model(job, sensitivities)
    tables = solved_tables(sensitivities, bounds)
    if sensitivities.threshold_sensitivity is None:
        return Calibration(tables, None)
    decode = solve_mean_quotas(sensitivities.threshold_sensitivity, bounds)
    means = [decode]
    if sensitivities.prefill_threshold_sensitivity is not None:
        means.append(solve_mean_quotas(sensitivities.prefill_threshold_sensitivity, bounds))
    anchors = anchor_rows(len(decode.quotas), anchor_count)
    thresholds, errors = _calibrated(job, sensitivities, means, anchors, progress)
    tables = replace(
        tables,
        thresholds=thresholds[0],
        threshold_quotas=decode.quotas,
        threshold_predicted_loss=decode.predicted_loss,
        provenance={
            **tables.provenance,
            "threshold_score": "weight * saliency",
            "threshold_heldout_errors": [round(error, 5) for error in errors],
        },
    )
    if len(means) > 1:
        tables = replace(
            tables,
            prefill_thresholds=thresholds[1],
            prefill_threshold_quotas=means[1].quotas,
            prefill_threshold_loss=means[1].predicted_loss,
        )
    return Calibration(tables, max(map(abs, errors)))


def _calibrated(
    job: ProfileJob,
    sensitivities: Sensitivities,
    means: Sequence[MeanQuotas],
    anchors: Sequence[int],
    progress: Progress,
) -> tuple[list[Matrix], list[float]]:
    """Return the thresholds of each phase and all held-out errors."""
    reduced = np.concatenate([mean.quotas[list(anchors)] for mean in means])
    # Each anchor is there twice: scores of the calibration and of held-out text are kept apart.
    plan = uniform_plan(reduced.shape[1], sensitivities.top_k, np.repeat(reduced, 2, axis=0))
    for old in job.folder.glob("scores-*.npz"):
        old.unlink()
    with serving(job, plan, f"{PROBE_NOTE}threshold", sensitivities.saliency, progress) as server:
        windows = windows_of(job, server, None)
        parts = _split(windows)
        length = job.settings.prefix_tokens + job.settings.continuation_tokens
        left = len(reduced) * len(windows) * length
        progress.stage("thresholds", left)
        for probe in range(len(plan.rows) - 1):
            server.set_probe(probe)
            tokens = run_whole(server, parts[probe % 2], job.settings.chunk_windows)
            left -= tokens
            progress.advance(tokens, left)
        server.set_probe(plan.full_row)  # writes the last record
    scores = [_scores(job, probe) for probe in range(len(plan.rows) - 1)]
    found, errors = [], []
    for number, mean in enumerate(means):
        mine = scores[2 * number * len(anchors) :][: 2 * len(anchors)]
        thresholds = thresholds_of(mean, anchors, mine[::2])
        found.append(thresholds)
        errors += heldout_errors(thresholds, mean, anchors, mine[1::2])
    return found, errors


def _split(windows: Sequence[Window]) -> tuple[list[Window], list[Window]]:
    heldout = list(windows[HELDOUT_EVERY - 1 :: HELDOUT_EVERY])
    if not heldout:
        raise ConfigurationError(
            f"Calibrating needs at least {HELDOUT_EVERY} windows, one of them held out; --windows "
            f"is {len(windows)}."
        )
    return [w for i, w in enumerate(windows) if i % HELDOUT_EVERY != HELDOUT_EVERY - 1], heldout


def _scores(job: ProfileJob, probe: int) -> Scores:
    path = job.folder / f"scores-{probe + 1}.npz"
    if not path.exists():
        raise ConfigurationError(
            f"The engine recorded no scores at {path}: is the folder shared with the machine that "
            "serves?"
        )
    with np.load(path) as record:
        return Scores(record["counts"], record["tokens"])


def _require_same_model(job: ProfileJob, sensitivities: Sensitivities) -> None:
    model = sensitivities.model
    if model is None:
        raise ConfigurationError(
            "The sensitivities do not say which model they are of, so nothing can be calibrated: "
            "profile the model, or use `sglang-alloc solve`."
        )
    found = (model.fingerprint, model.layer_ids)
    if found != (job.model.identity.fingerprint(), job.model.layer_ids):
        raise ModelMismatchError(
            f"The sensitivities were measured on {model.model_id} and {job.model.path} is another "
            f"model: MoE layers {len(model.layer_ids)} and {len(job.model.layer_ids)}, "
            f"fingerprints {model.fingerprint[:12]} and {job.model.identity.fingerprint()[:12]}. "
            "Profile this one."
        )
