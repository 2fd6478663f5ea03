"""Offline story, choosing: which rule loses least at equal measured activations, on this model.

`python -m sglang_alloc.reference.rule_survey` writes RULES.md into the model's folder. The tables
do not depend on it: it is the evidence for what `calibrate` chose.
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from sglang_alloc.reference.allocations import (
    KeptCounter,
    layer_allocation,
    threshold_allocation,
    token_allocation,
)
from sglang_alloc.reference.architecture import FAMILIES
from sglang_alloc.reference.calibrate import CALIBRATION_WINDOWS, WORKERS, sample_windows
from sglang_alloc.reference.export import load_checkpoint
from sglang_alloc.reference.heldout import token_losses
from sglang_alloc.reference.model import Allocation, ReferenceModel
from sglang_alloc.reference.model_folder import model_folder
from sglang_alloc.reference.sensitivity import profile_sensitivity
from sglang_alloc.reference.threshold_quotas import threshold_quotas
from sglang_alloc.reference.thresholds import calibrate_thresholds, measure_saliency
from sglang_alloc.solve import solve_all_budgets

UNIFORM_QUOTAS = (2, 3, 4, 5, 6)
HELDOUT_WINDOWS_PER_DOMAIN = 28
RESAMPLES = 2_000


class Rule(NamedTuple):
    """One way to spend a budget; `name` is its row in the report."""

    name: str
    quota: int  # mean activations per token and layer
    allocation: Allocation


class Finding(NamedTuple):
    """Loss above the full model of each held-out window (W,), and what was kept per layer."""

    rule: Rule
    losses: Tensor
    kept: float


def rules_of(
    model: ReferenceModel, windows: Tensor, executor: ThreadPoolExecutor, quotas: Sequence[int]
) -> list[Rule]:
    """Calibrate every rule on windows (B, S + 1), at each of the uniform quotas."""
    layers = model.config.num_layers
    saliency = measure_saliency(model, windows)
    original = solve_all_budgets(profile_sensitivity(model, windows, executor).numpy())
    rescaled = solve_all_budgets(
        profile_sensitivity(model, windows, executor, renormalize=True).numpy()
    )

    fractional = threshold_quotas(model, windows, saliency, executor)

    def thresholds(targets: Sequence[float], scores: Tensor | None) -> list[float]:
        return calibrate_thresholds(model, windows, scores, targets).thresholds

    def at_quota(k: int) -> list[Rule]:
        uniform = [k] * layers
        row = k * layers - layers
        solved, solved_rescaled = original.quotas[row].tolist(), rescaled.quotas[row].tolist()
        by_weight = thresholds(uniform, None)
        by_score = thresholds(uniform, saliency)
        by_score_solved = thresholds(solved, saliency)
        by_score_fractional = thresholds(fractional[row].tolist(), saliency)
        choices: dict[str, Allocation] = {
            "uniform k": layer_allocation(uniform),
            "uniform k, rescaled to full mass": layer_allocation(uniform, renormalize=True),
            "DP quotas (isolated profile)": layer_allocation(solved),
            "DP quotas, profiled and rescaled": layer_allocation(solved_rescaled, renormalize=True),
            "token selection, uniform quotas": token_allocation(uniform),
            "threshold on weight": threshold_allocation(by_weight, None),
            "threshold on weight x saliency": threshold_allocation(by_score, saliency),
            "the same, uniform and rescaled to full mass": threshold_allocation(
                by_score, saliency, renormalize=True
            ),
            "the same, DP quotas": threshold_allocation(by_score_solved, saliency),
            "the same, DP in half slots under thresholds": threshold_allocation(
                by_score_fractional, saliency
            ),
        }
        return [Rule(name, k, allocation) for name, allocation in choices.items()]

    return [rule for rules in executor.map(at_quota, quotas) for rule in rules]


def survey(
    model: ReferenceModel, rules: list[Rule], windows: Tensor, executor: ThreadPoolExecutor
) -> list[Finding]:
    """Measure every rule on held-out windows (W, S + 1)."""
    full = token_losses(model, windows)

    def measure(rule: Rule) -> Finding:
        counter = KeptCounter(rule.allocation, model.config.num_layers)
        losses = (token_losses(model, windows, counter) - full).mean(dim=1)
        return Finding(rule, losses, float(counter.mean_kept.mean()))

    return list(executor.map(measure, rules))


def report_text(findings: list[Finding], window_count: int) -> str:
    """Markdown: one row per rule, one column per quota; intervals are paired with uniform k."""
    quotas = sorted({finding.rule.quota for finding in findings})
    names = list(dict.fromkeys(finding.rule.name for finding in findings))
    cells = {(f.rule.name, f.rule.quota): f for f in findings}
    baseline = {k: cells[names[0], k].losses for k in quotas}
    rows = [
        f"| {name} | " + " | ".join(_cell(cells[name, k], baseline[k]) for k in quotas) + " |"
        for name in names
    ]
    head = "| rule | " + " | ".join(f"k = {k}" for k in quotas) + " |"
    return (
        "# Rules compared at equal mean activations\n\n"
        f"Loss above the full model in nats per byte on {window_count} held-out windows; in\n"
        "brackets the kept activations per token and layer that were measured, and the 95%\n"
        "interval of the difference from uniform k (paired bootstrap over windows). Without\n"
        "rescaling, kept slots have the weights that the full top-k gave them.\n\n"
        + "\n".join([head, "|" + "---|" * (len(quotas) + 1), *rows])
        + "\n"
    )


def _cell(finding: Finding, baseline: Tensor) -> str:
    difference = (finding.losses - baseline).numpy()
    picks = np.random.default_rng(0).integers(len(difference), size=(RESAMPLES, len(difference)))
    low, high = np.quantile(difference[picks].mean(axis=1), [0.025, 0.975])
    return f"{finding.losses.mean():.4f} ({finding.kept:.2f}; {low:+.4f}..{high:+.4f})"


def main(arguments: list[str] | None = None) -> None:
    """Survey the rules on a reference model."""
    parser = argparse.ArgumentParser(prog="python -m sglang_alloc.reference.rule_survey")
    parser.add_argument("--family", choices=FAMILIES, default="qwen3_moe")
    parser.add_argument("--model", type=Path, help="model folder (default: beside this script)")
    options = parser.parse_args(arguments)
    folder = options.model or model_folder(options.family)
    model = load_checkpoint(folder)
    torch.set_num_threads(1)
    calibration = torch.cat(list(sample_windows("calibration", CALIBRATION_WINDOWS).values()))
    heldout = torch.cat(list(sample_windows("heldout", HELDOUT_WINDOWS_PER_DOMAIN).values()))
    with ThreadPoolExecutor(WORKERS) as executor:
        rules = rules_of(model, calibration, executor, UNIFORM_QUOTAS)
        findings = survey(model, rules, heldout, executor)
    text = report_text(findings, len(heldout))
    (folder / "RULES.md").write_text(text)
    Console().print(text, markup=False)


if __name__ == "__main__":
    main()
