"""The reference model's tables: measured on one text, true on another."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
import torch
from reference_factory import make_model, make_windows

from sglang_alloc.budget_tables import BudgetTables, load_budget_tables
from sglang_alloc.evaluation.material import domains_in_turn
from sglang_alloc.evaluation.rules import Subject, served_threshold
from sglang_alloc.model_identity import identity_from_config
from sglang_alloc.reference.allocations import (
    KeptCounter,
    apply_kept,
    layer_allocation,
    threshold_allocation,
    token_allocation,
)
from sglang_alloc.reference.architecture import FAMILIES
from sglang_alloc.reference.export import load_checkpoint
from sglang_alloc.reference.heldout import token_losses, windows_of
from sglang_alloc.reference.model import ReferenceModel
from sglang_alloc.reference.model_folder import model_folder
from sglang_alloc.reference.sensitivity import profile_sensitivity
from sglang_alloc.reference.threshold_quotas import (
    measured_quotas,
    profile_threshold_losses,
    threshold_quotas,
)
from sglang_alloc.reference.thresholds import (
    calibrate_thresholds,
    measure_saliency,
    threshold_of_scores,
)


@cache
def _committed_tables(family: str) -> BudgetTables:
    return load_budget_tables(model_folder(family) / "budget_tables.npz")


def _sensitivity(model: ReferenceModel, windows: torch.Tensor) -> torch.Tensor:
    with ThreadPoolExecutor(2) as executor:
        return profile_sensitivity(model, windows, executor)


def test_full_allocation_changes_nothing() -> None:
    model, windows = make_model(), make_windows()
    full = token_losses(model, windows)
    assert torch.equal(full, token_losses(model, windows, layer_allocation([4, 4])))
    assert torch.equal(full, token_losses(model, windows, token_allocation([4, 4])))


@pytest.mark.parametrize("renormalize", [False, True])
def test_kept_weights_stay_or_carry_the_full_mass(renormalize: bool) -> None:
    weights = torch.tensor([[0.5, 0.3, 0.2]])
    reduced = apply_kept(weights, torch.tensor([[True, True, False]]), renormalize=renormalize)
    expected = [[0.625, 0.375, 0.0]] if renormalize else [[0.5, 0.3, 0.0]]
    torch.testing.assert_close(reduced, torch.tensor(expected))


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_sensitivity_is_the_loss_of_one_reduced_layer(family: str) -> None:
    model, windows = make_model(family), make_windows()
    sensitivity = _sensitivity(model, windows)
    difference = token_losses(model, windows, layer_allocation([4, 2])) - token_losses(
        model, windows
    )
    assert sensitivity.shape == (2, 4)
    assert sensitivity[1, 1].item() == pytest.approx(difference.mean().item(), abs=1e-5)
    assert sensitivity[:, -1].tolist() == [0.0, 0.0]


def test_sensitivity_of_late_layers_reuses_the_early_ones_exactly() -> None:
    model, windows = make_model(), make_windows()
    reduced = token_losses(model, windows, layer_allocation([1, 4])).mean()
    expected = reduced - token_losses(model, windows).mean()
    found = _sensitivity(model, windows)[0, 0]
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("quota", [1.0, 1.5, 2.75, 4.0])
def test_threshold_keeps_its_quota_exactly_on_its_own_text(quota: float) -> None:
    model, windows = make_model(), make_windows()
    saliency = measure_saliency(model, windows)
    row = calibrate_thresholds(model, windows, saliency, [quota, quota])
    counter = KeptCounter(threshold_allocation(row.thresholds, saliency), 2)
    loss = token_losses(model, windows, counter).mean().item()
    assert counter.mean_kept.tolist() == pytest.approx([quota, quota], abs=0.02)
    assert loss == pytest.approx(row.loss, abs=1e-4)


def test_threshold_at_quota_one_keeps_only_the_best() -> None:
    scores = torch.tensor([[0.4, 0.9], [0.8, 0.1]])
    assert threshold_of_scores(scores, 1.0) > 0.9
    assert threshold_of_scores(scores, 1.5) == pytest.approx(0.4)
    assert threshold_of_scores(scores, 2.0) == 0.0


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_quotas_of_thresholds_spend_every_budget(family: str) -> None:
    model, windows = make_model(family), make_windows()
    with ThreadPoolExecutor(2) as executor:
        quotas = threshold_quotas(model, windows, measure_saliency(model, windows), executor)
    assert quotas.sum(axis=1).tolist() == list(range(2, 9))
    assert quotas.min() == 1
    assert quotas[-1].tolist() == [4, 4]


def test_threshold_losses_fall_with_the_quota_and_end_at_zero() -> None:
    with ThreadPoolExecutor(2) as executor:
        losses = profile_threshold_losses(make_model(), make_windows(), None, executor)
    assert losses.shape == (2, 7)
    assert (np.diff(losses, axis=1) <= 0).all()
    assert losses[:, -1].tolist() == [0, 0]


def test_loss_bends_below_half_the_slots_so_more_quotas_are_measured_there() -> None:
    assert measured_quotas(4) == [1, 1.5, 2, 3, 4]
    assert measured_quotas(6) == [1, 1.5, 2, 2.5, 3, 4, 5, 6]


def test_expert_without_tokens_gets_its_layers_mean_saliency() -> None:
    saliency = measure_saliency(make_model(), make_windows(1, 3))
    assert torch.isfinite(saliency).all()
    assert (saliency > 0).all()


def test_windows_do_not_overlap() -> None:
    tokens = np.arange(1_000, dtype=np.int16)
    windows = windows_of(tokens, 100, 50)
    assert windows.shape == (9, 101)
    assert (np.diff(windows[:, 0].numpy()) >= 100).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_committed_tables_belong_to_the_committed_checkpoint(family: str) -> None:
    folder, tables = model_folder(family), _committed_tables(family)
    config = json.loads((folder / "config.json").read_text())
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert tables.fingerprint == identity_from_config(config).fingerprint()
    assert tables.provenance["checkpoint_sha256"] == weights
    assert tables.budget_min == tables.num_layers


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "name", ["thresholds", "union_thresholds", "references", "gains", "saliency"]
)
def test_committed_tables_hold_every_mode_and_both_corrections(family: str, name: str) -> None:
    assert getattr(_committed_tables(family), name) is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_committed_sets_of_the_union_are_opened_by_the_thresholds(family: str) -> None:
    arrays, top_k = _committed_tables(family).arrays(), _committed_tables(family).top_k
    assert "union_quotas" not in arrays
    np.testing.assert_array_equal(arrays["union_thresholds"], arrays["thresholds"])
    assert (arrays["union_references"][-1] == top_k).all()
    # What rides besides can only help: at half the budget and below it does so clearly.
    half = len(arrays["budgets"]) // 2
    assert (arrays["union_predicted_loss"] <= arrays["threshold_predicted_loss"] + 0.001).all()
    pairs = (arrays["union_predicted_loss"][:half], arrays["threshold_predicted_loss"][:half])
    assert (pairs[0] < pairs[1]).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("full_ratio", [1 / 3, 2 / 3])
def test_committed_thresholds_keep_their_budget_on_heldout_text(
    family: str, full_ratio: float
) -> None:
    tables = _committed_tables(family)
    budget = round(full_ratio * tables.budget_max)
    with ThreadPoolExecutor(1) as executor:
        subject = Subject(load_checkpoint(model_folder(family)), tables, torch.zeros(0), executor)
        windows = domains_in_turn("heldout", 24, 512)
        counter = KeptCounter(served_threshold(subject, budget), tables.num_layers)
        token_losses(subject.model, windows, counter)
    assert counter.mean_kept.sum().item() == pytest.approx(budget, rel=0.02)
