"""The reference model under mode `union`, and with gains."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from reference_factory import make_model, make_windows

from sglang_alloc.reference.allocations import layer_allocation, scores
from sglang_alloc.reference.calibrate import union_windows
from sglang_alloc.reference.gains import GainCalibration, gained
from sglang_alloc.reference.heldout import token_losses
from sglang_alloc.reference.thresholds import calibrate_thresholds, measure_saliency
from sglang_alloc.reference.union_quotas import (
    distinct_experts,
    profile_union_losses,
    union_allocation,
)
from sglang_alloc_kernels.union_selection import union_selection_torch


def test_the_union_of_each_step_is_what_the_serving_rule_keeps() -> None:
    torch.manual_seed(0)
    groups, batch, steps, experts = 2, 3, 5, 12
    weights, ids = torch.rand(groups * batch * steps, experts).softmax(1).topk(4)
    saliency = torch.rand(1, experts) + 0.5
    found = union_allocation([2], saliency, batch, steps)(0, weights, ids, weights)
    for group in range(groups):
        for step in range(steps):
            rows = [(group * batch + i) * steps + step for i in range(batch)]
            slot_scores = scores(0, ids[rows], weights[rows], saliency)
            kept = union_selection_torch(slot_scores, ids[rows], 2, experts)
            assert torch.equal(found[rows] > 0, kept)


def test_opening_with_every_slot_keeps_every_slot() -> None:
    model, windows = make_model(), make_windows()
    saliency = measure_saliency(model, windows)
    rule = union_allocation([4, 4], saliency, len(windows), windows.shape[1] - 1)
    assert torch.equal(token_losses(model, windows, rule), token_losses(model, windows))


def test_losses_of_the_union_fall_and_are_below_those_of_plain_k() -> None:
    model, windows = make_model(), make_windows()
    saliency = measure_saliency(model, windows)
    with ThreadPoolExecutor(2) as executor:
        losses = profile_union_losses(model, windows, saliency, len(windows), executor)
    assert losses.shape == (2, 4)
    assert (np.diff(losses, axis=1) <= 0).all()
    assert losses[:, -1].tolist() == [0, 0]


def test_distinct_experts_are_counted_per_step() -> None:
    kept = torch.tensor([[0, 1], [2, -1], [0, 3], [2, 2]])  # two windows of two steps
    assert distinct_experts(kept, batch=2, steps=2, num_experts=4) == 2.0


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
