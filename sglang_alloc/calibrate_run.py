"""Offline story, calibrating: complete budget tables out of sensitivities, by a real server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from sglang_alloc.budget_tables import BudgetTables
from sglang_alloc.calibrate_corrections import Matrix, gains_of_rows
from sglang_alloc.calibrate_engine import AnchorRecord, Records, record_anchors
from sglang_alloc.calibrate_thresholds import (
    MeanQuotas,
    anchor_rows,
    heldout_errors,
    solve_mean_quotas,
    thresholds_of,
)
from sglang_alloc.errors import ConfigurationError, ModelMismatchError
from sglang_alloc.profile_run import Progress
from sglang_alloc.profile_settings import ProfileJob
from sglang_alloc.sensitivity_file import Sensitivities
from sglang_alloc.solve_bounds import QuotaBounds
from sglang_alloc.solve_tables import solved_tables

ANCHORS = 13


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
    corrections: bool = True,
) -> Calibration:
    """Solve the sensitivities, and calibrate thresholds if they were profiled for them.

    The text is run at `anchor_count` budgets of each phase. With `corrections`, references and
    gains are found too, and kept where they lower the loss.

    Raises:
        ModelMismatchError: the sensitivities are another model's.
        ConfigurationError: they are nobody's, or the text does not do.
        ProfileError, ProcessDiedError: the engine failed.
    """
    _require_same_model(job, sensitivities)
    tables = solved_tables(sensitivities, bounds)
    if sensitivities.threshold_sensitivity is None:
        return Calibration(tables, None)
    means = [solve_mean_quotas(sensitivities.threshold_sensitivity, bounds)]
    if sensitivities.prefill_threshold_sensitivity is not None:
        means.append(solve_mean_quotas(sensitivities.prefill_threshold_sensitivity, bounds))
    anchors = anchor_rows(len(means[0].quotas), anchor_count)
    records = record_anchors(job, sensitivities, means, anchors, progress, corrections=corrections)
    errors = [
        error
        for mean, found in zip(means, records.anchors, strict=True)
        for error in _heldout_errors(mean, anchors, found)
    ]
    tables = _with_thresholds(tables, means, anchors, records)
    if corrections:
        tables = _with_corrections(tables, means, anchors, records)
    tables = _with_union(tables)
    note = {"threshold_heldout_errors": [round(error, 5) for error in errors]}
    tables = replace(tables, provenance={**tables.provenance, **note})
    return Calibration(tables, max(map(abs, errors)))


def _thresholds(mean: MeanQuotas, anchors: Sequence[int], found: Sequence[AnchorRecord]) -> Matrix:
    return thresholds_of(mean, anchors, [record.scores for record in found])


def _heldout_errors(
    mean: MeanQuotas, anchors: Sequence[int], found: Sequence[AnchorRecord]
) -> list[float]:
    heldout = [record.heldout_scores for record in found]
    return heldout_errors(_thresholds(mean, anchors, found), mean, anchors, heldout)


def _with_thresholds(
    tables: BudgetTables, means: Sequence[MeanQuotas], anchors: Sequence[int], records: Records
) -> BudgetTables:
    decode, *prefill = zip(means, records.anchors, strict=True)
    tables = replace(
        tables,
        thresholds=_thresholds(decode[0], anchors, decode[1]),
        threshold_quotas=decode[0].quotas,
        threshold_predicted_loss=decode[0].predicted_loss,
        provenance={**tables.provenance, "threshold_score": "weight * saliency"},
    )
    for mean, found in prefill:
        tables = replace(
            tables,
            prefill_thresholds=_thresholds(mean, anchors, found),
            prefill_threshold_quotas=mean.quotas,
            prefill_threshold_loss=mean.predicted_loss,
        )
    return tables


def _with_corrections(
    tables: BudgetTables, means: Sequence[MeanQuotas], anchors: Sequence[int], records: Records
) -> BudgetTables:
    """Add references and gains; those that did not help on the calibration text are left out."""
    losses = _loss_by_correction(tables, anchors, records.anchors[0])
    layers = tables.num_layers
    if any(k2 < tables.top_k for k2 in records.references):
        references = np.repeat(np.array(records.references)[:, None], layers, axis=1)
        tables = replace(tables, references=references)
    if np.mean([row["both"] - row["references"] for row in losses.values()]) < 0:
        decode, *prefill = [
            gains_of_rows(mean.quotas, anchors, np.stack([record.gains for record in found]))
            for mean, found in zip(means, records.anchors, strict=True)
        ]
        tables = replace(tables, gains=decode, prefill_gains=prefill[0] if prefill else None)
    note = {"corrections": "mode threshold", "correction_losses": losses}
    return replace(tables, provenance={**tables.provenance, **note})


def _with_union(tables: BudgetTables) -> BudgetTables:
    """Let the thresholds open the sets of mode `union`, with their references.

    It keeps what mode `threshold` keeps, and what rides besides, so that mode's loss bounds its
    own. Quotas that were profiled for it give way: at as many experts read they lose more.
    """
    return replace(
        tables,
        union_quotas=None,
        union_thresholds=tables.thresholds,
        union_references=tables.references,
        union_predicted_loss=tables.threshold_predicted_loss,
        provenance={**tables.provenance, "union_predicted_loss": "that of mode threshold"},
    )


def _loss_by_correction(
    tables: BudgetTables, anchors: Sequence[int], found: Sequence[AnchorRecord]
) -> dict[str, dict[str, float]]:
    """Return by budget what was lost on the calibration text, in nats per token above full."""
    full = found[-1].losses
    return {
        str(tables.budget_min + anchor): {
            "none": _mean(record.uncorrected - full),
            "references": _mean(record.referenced - full),
            "both": _mean(record.losses - full),
        }
        for anchor, record in zip(anchors, found, strict=True)
        if record.uncorrected is not None and record.referenced is not None
    }


def _mean(losses: Matrix) -> float:
    return round(float(losses.mean()), 6)


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
