"""The reference model under mode `union`, and with gains."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluation_factory import make_tables
from reference_factory import make_model, make_windows

from sglang_alloc.reference.allocations import layer_allocation, scores
from sglang_alloc.reference.calibrate import union_windows
from sglang_alloc.reference.gains import GainCalibration, gained
from sglang_alloc.reference.heldout import token_losses
from sglang_alloc.reference.thresholds import calibrate_thresholds, measure_saliency
from sglang_alloc.reference.union_sets import (
    calibrate_union,
    served_union,
    union_allocation,
)
from sglang_alloc_kernels.score_threshold import score_threshold_torch
from sglang_alloc_kernels.union_selection import opened_selection_torch


def test_the_union_of_each_step_is_what_the_serving_rule_keeps() -> None:
    torch.manual_seed(0)
    groups, batch, steps, experts = 2, 3, 5, 12
    weights, ids = torch.rand(groups * batch * steps, experts).softmax(1).topk(4)
    saliency = torch.rand(1, experts) + 0.5
    threshold = float(scores(0, ids, weights, saliency).quantile(0.7))
    found = union_allocation([threshold], saliency, batch, steps)(0, weights, ids, weights)
    riding = 0
    for group in range(groups):
        for step in range(steps):
            rows = [(group * batch + i) * steps + step for i in range(batch)]
            slot_scores = scores(0, ids[rows], weights[rows], saliency)
            opening = score_threshold_torch(slot_scores, threshold)
            kept = opened_selection_torch(slot_scores, ids[rows], opening, experts)
            assert torch.equal(found[rows] > 0, kept)
            riding += int((kept & ~opening).sum())
    assert riding > 0


def test_opening_with_every_slot_keeps_every_slot() -> None:
    model, windows = make_model(), make_windows()
    saliency = measure_saliency(model, windows)
    rule = union_allocation([0.0, 0.0], saliency, len(windows), windows.shape[1] - 1)
    assert torch.equal(token_losses(model, windows, rule), token_losses(model, windows))


def test_losses_of_the_union_are_those_of_the_tables_as_they_are_served() -> None:
    model, windows = make_model(), make_windows()
    tables = make_tables(model)
    assert tables.thresholds is not None
    saliency = measure_saliency(model, windows)
    batch, steps = len(windows), windows.shape[1] - 1
    with ThreadPoolExecutor(2) as executor:
        found = calibrate_union(
            model, windows, saliency, tables.thresholds, batch=batch, executor=executor
        )
    assert len(found.references) == len(tables.budgets)
    assert set(found.references[:-1]) <= {2, 3, 4}
    assert (found.references[-1], found.losses[-1]) == (4, 0.0)
    full = token_losses(model, windows)
    for row in (0, 3):
        k2 = found.references[row]
        losses = {}
        for reference in (2, 3, 4):
            references = np.full(tables.quotas.shape, reference, dtype=np.int16)
            served = replace(tables, union_references=references)
            rule = served_union(served, int(tables.budgets[row]), saliency, batch, steps)
            losses[reference] = float((token_losses(model, windows, rule) - full).mean())
        assert losses[k2] == pytest.approx(float(found.losses[row]), abs=1e-5)
        assert losses[k2] == pytest.approx(min(losses.values()), abs=1e-5)


def test_a_batch_mixes_the_domains() -> None:
    windows = {name: torch.full((6, 3), value) for value, name in enumerate("abc")}
    assert union_windows(windows)[:, 0].tolist() == [0, 1, 2] * 5 + [0]


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_a_gain_is_the_least_squares_factor_of_a_layer_s_output(family: str) -> None:
    model, windows = make_model(family), make_windows()
    calibration = GainCalibration(model, layer_allocation([4, 4]))
    model(windows[:, :-1], calibration)
    assert list(calibration.gains.values()) == pytest.approx([1.0, 1.0])
    half = GainCalibration(model, lambda _l, _x, _ids, weights: weights / 2)
    model(windows[:, :-1], half)
    assert list(half.gains.values()) == pytest.approx([2.0, 2.0], rel=1e-4)


def test_calibrated_gains_give_the_loss_that_was_calibrated() -> None:
    model, windows = make_model(), make_windows()
    saliency = measure_saliency(model, windows)
    plain = calibrate_thresholds(model, windows, saliency, [1.5, 2])
    assert plain.gains == [1.0, 1.0]
    row = calibrate_thresholds(model, windows, saliency, [1.5, 2], with_gains=True)
    assert all(gain != 1.0 for gain in row.gains)
    rule = gained(lambda _l, _x, _ids, weights: weights, [2.0, 3.0])
    assert rule(1, windows, windows, torch.ones(1)).item() == 3.0
