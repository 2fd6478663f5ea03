"""Offline story for the reference model: `python -m sglang_alloc.reference.calibrate`."""

import argparse
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from sglang_alloc.budget_tables import BudgetTables, save_budget_tables
from sglang_alloc.calibrate_corrections import references_of_rows
from sglang_alloc.calibrate_thresholds import anchor_rows
from sglang_alloc.model_identity import identity_from_config
from sglang_alloc.profile_plan import falling_to_zero
from sglang_alloc.reference.architecture import FAMILIES
from sglang_alloc.reference.export import load_checkpoint
from sglang_alloc.reference.heldout import windows_of
from sglang_alloc.reference.model import ReferenceModel
from sglang_alloc.reference.model_folder import model_folder
from sglang_alloc.reference.rule_comparison import (
    compare_modes,
    held_out,
    loss_table_text,
    write_loss_rows,
)
from sglang_alloc.reference.samples import read_sample
from sglang_alloc.reference.sensitivity import profile_sensitivity
from sglang_alloc.reference.threshold_quotas import threshold_quotas
from sglang_alloc.reference.thresholds import CalibratedRow, calibrate_thresholds, measure_saliency
from sglang_alloc.reference.union_sets import REFERENCE_ANCHORS, UnionRows, calibrate_union
from sglang_alloc.solve import solve_all_budgets

WINDOW_TOKENS = 1_024  # the trained context: beyond it losses mean nothing
CALIBRATION_WINDOWS, HELDOUT_WINDOWS = 10, 7  # per domain
UNION_BATCH = 8  # requests in a decode step: the smallest that shares many experts loses most
UNION_WINDOWS = 16  # two such batches
WORKERS = 2
BUDGETS_HEAD = f"""# Loss by budget

Held-out loss above the full model in nats per byte, domains weighed equally, {HELDOUT_WINDOWS}
windows of {WINDOW_TOKENS} bytes per domain; `kept` is the measured mean number of activations per
token, summed over the layers. `loss_by_budget.csv` has the domains apart.

"""


def build_tables(
    model: ReferenceModel,
    folder: Path,
    calibration: dict[str, Tensor],
    executor: Executor,
    progress: Progress,
) -> BudgetTables:
    """Measure and solve everything the tables hold, on windows (B, S + 1) per domain."""
    windows = torch.cat(list(calibration.values()))
    identity = identity_from_config(json.loads((folder / "config.json").read_text()))
    saliency = measure_saliency(model, windows)
    task = progress.add_task("sensitivities", total=None)
    sensitivity = profile_sensitivity(model, windows, executor).numpy()
    progress.remove_task(task)
    solution = solve_all_budgets(sensitivity)
    task = progress.add_task("quotas of thresholds", total=None)
    targets = threshold_quotas(model, windows, saliency, executor)
    progress.remove_task(task)

    def calibrated(quotas: NDArray[np.float64], reference: int) -> CalibratedRow:
        return calibrate_thresholds(
            model, windows, saliency, quotas.tolist(), reference=reference, with_gains=True
        )

    task = progress.add_task("references", total=None)
    references = best_references(targets, model.config.top_k, calibrated, executor)
    progress.remove_task(task)
    found = executor.map(calibrated, targets, references)
    rows = list(progress.track(found, total=len(targets), description="thresholds"))
    thresholds = np.array([row.thresholds for row in rows], dtype=np.float32)
    task = progress.add_task("sets of the union", total=None)
    together = union_windows(calibration)
    union = calibrate_union(
        model, together, saliency, thresholds, batch=UNION_BATCH, executor=executor
    )
    progress.remove_task(task)
    return with_union(
        BudgetTables(
            model_id=folder.name,
            fingerprint=identity.fingerprint(),
            num_experts=model.config.num_experts,
            top_k=model.config.top_k,
            layer_ids=np.arange(model.config.num_layers, dtype=np.int32),
            budgets=solution.budgets,
            quotas=solution.quotas,
            predicted_loss=solution.predicted_loss,
            sensitivity=sensitivity,
            thresholds=thresholds,
            threshold_quotas=targets,
            references=np.repeat(np.array(references)[:, None], targets.shape[1], axis=1),
            # Below zero, or rising with the budget, is noise: nobody is promised to gain by it.
            threshold_predicted_loss=falling_to_zero(
                np.array([row.loss - rows[-1].loss for row in rows])
            ),
            gains=np.array([row.gains for row in rows], dtype=np.float32),
            saliency=saliency.numpy(),
            provenance={
                "made_by": "sglang_alloc.reference.calibrate",
                "checkpoint_sha256": _sha256(folder / "model.safetensors"),
                "calibration_sha256": _digest(windows.numpy()),
                "calibration_tokens": windows[:, 1:].numel(),
                "window_tokens": windows.shape[1] - 1,
                "domains": list(calibration),
                "sensitivity": "isolated profile, original weights of the kept slots",
                "threshold_score": "weight * saliency",
                "threshold_predicted_loss": "measured on the calibration text, all layers reduced",
                "gains": "least squares between kept and full output of each layer, mode threshold",
                "references": "k2 of least calibration loss, one for all layers, mode threshold",
                "torch": torch.__version__,
            },
        ),
        union,
    )


def with_union(tables: BudgetTables, union: UnionRows) -> BudgetTables:
    """Add the rows of mode `union`, whose sets are opened by the thresholds of mode `threshold`."""
    note = f"measured on steps of {UNION_BATCH} windows of all domains, all layers reduced"
    return replace(
        tables,
        union_thresholds=tables.thresholds,
        union_references=np.repeat(np.array(union.references)[:, None], tables.num_layers, axis=1),
        union_predicted_loss=falling_to_zero(union.losses),
        provenance={**tables.provenance, "union_predicted_loss": note},
    )


def sample_windows(split: str, windows_per_domain: int) -> dict[str, Tensor]:
    """Windows of each domain's committed sample of `split`, as many in each domain."""
    return {
        domain: windows_of(tokens, WINDOW_TOKENS, windows_per_domain)
        for domain, tokens in read_sample(split).items()
    }


def best_references(
    targets: NDArray[np.float64],
    top_k: int,
    calibrated: Callable[[NDArray[np.float64], int], CalibratedRow],
    executor: Executor,
) -> list[int]:
    """Return the k2 of least loss for every budget, (N,), found at some of them.

    One k2 for all layers, judged with all of them reduced: k2 chosen layer by layer, with the
    others full, lost more on held-out text (0.0072 nats instead of 0.0053 at half budget).
    """
    anchors = anchor_rows(len(targets), REFERENCE_ANCHORS)
    candidates = range(top_k // 2, top_k + 1)
    pairs = [(row, k2) for row in anchors for k2 in candidates]
    found = executor.map(lambda pair: calibrated(targets[pair[0]], pair[1]).loss, pairs)
    losses = np.array(list(found)).reshape(len(anchors), -1)
    best = [candidates[i] for i in losses.argmin(axis=1)]
    best[-1] = top_k
    return references_of_rows(len(targets), anchors, best, top_k)


def union_windows(calibration: dict[str, Tensor]) -> Tensor:
    """Batches of UNION_BATCH windows, which take turns between the domains, like requests do."""
    in_turn = [
        rows[turn]
        for turn in range(max(map(len, calibration.values())))
        for rows in calibration.values()
        if turn < len(rows)
    ]
    return torch.stack(in_turn[:UNION_WINDOWS])


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(array: NDArray[np.int64]) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def main(arguments: list[str] | None = None) -> None:
    """Write budget_tables.npz, loss_by_budget.csv and BUDGETS.md into the model's folder."""
    parser = argparse.ArgumentParser(prog="python -m sglang_alloc.reference.calibrate")
    parser.add_argument("--family", choices=FAMILIES, default="qwen3_moe")
    parser.add_argument("--model", type=Path, help="model folder (default: beside this script)")
    options = parser.parse_args(arguments)
    folder = options.model or model_folder(options.family)
    model = load_checkpoint(folder)
    console = Console(stderr=True)
    torch.set_num_threads(1)  # whole passes run side by side instead
    with ThreadPoolExecutor(WORKERS) as executor, Progress(console=console) as progress:
        calibration = sample_windows("calibration", CALIBRATION_WINDOWS)
        tables = build_tables(model, folder, calibration, executor, progress)
        save_budget_tables(folder / "budget_tables.npz", tables)
        layers = model.config.num_layers
        budgets = range(tables.budget_max, tables.budget_min - 1, -layers)
        task = progress.add_task("held-out loss", total=2 * len(budgets))
        text = held_out(model, sample_windows("heldout", HELDOUT_WINDOWS))
        rows = []
        for row in compare_modes(model, tables, text, budgets, executor):
            rows.append(row)
            progress.advance(task)
    write_loss_rows(folder / "loss_by_budget.csv", rows)
    (folder / "BUDGETS.md").write_text(BUDGETS_HEAD + loss_table_text(rows))
    console.print(loss_table_text(rows), markup=False)
    console.print(f"wrote {folder / 'budget_tables.npz'}")


if __name__ == "__main__":
    main()
