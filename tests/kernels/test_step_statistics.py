"""A step's sums become totals; the kernel against its twin."""

from __future__ import annotations

import torch
from slot_cases import on

from sglang_alloc_kernels.step_statistics import (
    TOTALS,
    add_to_sums_torch,
    make_step_sums,
    make_totals,
    step_statistics,
    step_statistics_torch,
)

WEIGHTS = torch.tensor([[0.5, 0.25], [0.75, 0.25], [0.9, 0.1]])
IDS = torch.tensor([[4, 1], [4, 0], [-1, -1]], dtype=torch.int32)
KEPT = torch.tensor([[True, False], [True, True], [True, True]])


def test_a_step_is_added_to_the_totals_and_cleared(device: str) -> None:
    step, totals = make_step_sums(2, 60, "cpu"), make_totals(2, device)
    add_to_sums_torch(step, 1, WEIGHTS, IDS, KEPT)
    step = on(device, step)
    for _ in range(2):  # the second time there is nothing to add, not even a step
        step_statistics(step, totals)
    found = dict(zip(TOTALS, totals[1].tolist(), strict=True))
    assert found == {
        "steps": 1,
        "tokens": 2,
        "activations": 3,
        "mass": 1.75,
        "kept_mass": 1.5,
        "distinct_experts": 2,
    }
    assert not totals[0].any()
    assert not step.sums.any()
    assert not step.lit.any()


def test_kernel_equals_its_twin_over_steps(device: str) -> None:
    ours, theirs = make_totals(3, device), make_totals(3, "cpu")
    generator = torch.Generator().manual_seed(3)
    for tokens in (7, 0, 2):
        step = make_step_sums(3, 257, "cpu")
        weights = torch.rand(tokens, 4, generator=generator)
        ids = torch.randint(-1, 257, (tokens, 4), generator=generator)
        for layer in range(2):
            add_to_sums_torch(step, layer, weights, ids, weights > 0.3)
        step_statistics(on(device, step), ours)
        step_statistics_torch(step, theirs)
    torch.testing.assert_close(ours.cpu(), theirs)
    assert torch.equal(ours.cpu()[:, [0, 1, 2, 5]], theirs[:, [0, 1, 2, 5]])


def test_the_device_names_the_totals_that_a_step_is_added_to(device: str) -> None:
    """A captured graph adds to prefill's or decode's totals by what is in memory when it runs."""
    ours = torch.zeros(2, 2, len(TOTALS), dtype=torch.float64, device=device)
    theirs = torch.zeros_like(ours, device="cpu")
    part = torch.zeros(1, dtype=torch.int32)
    for index in (0, 1, 1):
        step = make_step_sums(2, 60, "cpu")
        add_to_sums_torch(step, 0, WEIGHTS, IDS, KEPT)
        part.fill_(index)
        step_statistics(on(device, step), ours, part.to(device))
        step_statistics_torch(step, theirs, part)
    torch.testing.assert_close(ours.cpu(), theirs)
    assert theirs[:, 0, 0].tolist() == [1, 2]


def test_a_nan_weight_counts_as_no_mass(device: str) -> None:
    weights = WEIGHTS.clone()
    weights[0] = float("nan")
    step, totals = make_step_sums(1, 60, "cpu"), make_totals(1, device)
    add_to_sums_torch(step, 0, weights, IDS, KEPT)
    step_statistics(on(device, step), totals)
    assert totals[0].tolist()[1:5] == [2, 3, 1.0, 1.0]
