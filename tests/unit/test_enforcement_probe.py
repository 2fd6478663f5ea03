"""Probes inside the engine: what they keep in each mode, and what they record."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sglang_alloc.allocation_mode import Mode
from sglang_alloc.enforcement import EnforcementTables, PhaseRows, RoutedSlots
from sglang_alloc.enforcement_probe import ProbeEnforcement, ProbeRecorders, ProbeRows
from sglang_alloc.saliency_record import SaliencyRecorder, saliency_of
from sglang_alloc.score_histogram import threshold_of_quota

TOKENS, TOP_K, EXPERTS = 200, 4, 8
QUOTAS = np.array([[1.0, 1.0], [1.5, 4.0], [2.0, 3.0], [4.0, 4.0]], np.float32)


def _probes(mode: Mode, record: Path | None = None, saliency: bool = False) -> ProbeEnforcement:
    rows = PhaseRows(np.ceil(QUOTAS).astype(np.int16), None, None)
    tables = EnforcementTables(
        mode=mode,
        top_k=TOP_K,
        budget_min=1,
        budget_max=len(QUOTAS),
        prefill=rows,
        decode=rows,
        saliency=np.linspace(1, 2, 2 * EXPERTS).reshape(2, EXPERTS) if saliency else None,
    )
    return ProbeEnforcement(tables, ProbeRows(QUOTAS), "cpu", record)


def _slots(seed: int = 0, tokens: int = TOKENS, num_shared: int = 0) -> RoutedSlots:
    torch.manual_seed(seed)
    weights, ids = torch.rand(tokens, EXPERTS).softmax(1).topk(TOP_K)
    shared = torch.ones(tokens, num_shared)
    return RoutedSlots(
        torch.cat([weights, shared], 1), torch.cat([ids, EXPERTS * shared.long()], 1), num_shared
    )


def _kept(slots: RoutedSlots) -> torch.Tensor:
    return (slots.ids >= 0).sum(dim=1).float()


def test_the_last_probe_is_the_unchanged_model() -> None:
    probes, slots = _probes("layer"), _slots()
    probes.set_budgets(4, 4)
    assert probes.drop(0, slots) is slots


def test_mode_layer_keeps_each_token_s_best() -> None:
    probes, slots = _probes("layer"), _slots()
    probes.set_budgets(3, 3)
    assert (probes.drop(0, slots).ids[:, :2] == slots.ids[:, :2]).all()
    assert (_kept(probes.drop(0, slots)) == 2).all()
    assert (_kept(probes.drop(1, slots)) == 3).all()


def test_mode_threshold_keeps_a_fraction_of_slots_on_average() -> None:
    probes, slots = _probes("threshold", saliency=True), _slots()
    probes.set_budgets(2, 2)
    kept = _kept(probes.drop(0, slots))
    assert kept.mean() == 1.5
    assert kept.min() == 1
    assert (_kept(probes.drop(1, slots)) == 4).all()


def test_mode_union_lets_slots_ride_on_the_experts_that_others_opened() -> None:
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]])
    slots = RoutedSlots(weights, torch.tensor([[0, 1, 2], [1, 3, 0]]), 0)
    probes = _probes("union")
    probes.set_budgets(1, 1)
    assert probes.drop(0, slots).ids.tolist() == [[0, 1, -1], [1, -1, 0]]


def test_shared_columns_are_left_alone() -> None:
    probes, slots = _probes("layer"), _slots(num_shared=1)
    probes.set_budgets(1, 1)
    found = probes.drop(0, slots)
    assert (found.ids[:, -1] == EXPERTS).all()
    assert (_kept(found) == 2).all()


def test_recorded_scores_give_the_threshold_that_was_in_effect(tmp_path: Path) -> None:
    probes = _probes("threshold", tmp_path, saliency=True)
    probes.set_budgets(2, 2)
    for seed in range(10):
        probes.drop(0, _slots(seed))
        probes.drop(1, _slots(seed))
    probes.set_budgets(4, 4)
    with np.load(tmp_path / "scores-2.npz") as record:
        counts, tokens = record["counts"], record["tokens"]
    assert tokens.tolist() == [10 * TOKENS] * 2
    threshold = threshold_of_quota(counts[0], int(tokens[0]), 2.5)
    fresh = _slots(99, tokens=5000)
    saliency = torch.linspace(1, 2, 2 * EXPERTS).view(2, EXPERTS)[0]
    scores = (fresh.weights * saliency[fresh.ids]).sort(dim=1).values
    kept = 1 + float((scores[:, :-1] >= threshold).sum()) / len(scores)
    assert kept == pytest.approx(2.5, rel=0.02)


def test_what_a_probe_recorded_twice_is_added_up(tmp_path: Path) -> None:
    probes = _probes("threshold", tmp_path)
    for _ in range(2):
        probes.set_budgets(1, 1)
        probes.drop(0, _slots())
        probes.set_budgets(4, 4)
    with np.load(tmp_path / "scores-1.npz") as record:
        assert record["tokens"].tolist() == [2 * TOKENS, 0]
        assert int(record["counts"].sum()) == 2 * TOKENS * (TOP_K - 1)


class _Output:
    def __init__(self, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> None:
        self.topk_weights, self.topk_ids = topk_weights, topk_ids

    def _replace(self, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> "_Output":
        return _Output(topk_weights, topk_ids)


class _Experts(torch.nn.Module):
    """Expert e multiplies by e + 1, over its input as the Triton kernels do."""

    def forward(self, hidden_states: torch.Tensor, topk_output: _Output) -> torch.Tensor:
        factor = (topk_output.topk_weights * (topk_output.topk_ids + 1)).sum(1, keepdim=True)
        return hidden_states.mul_(factor)


def test_probes_rank_by_the_saliency_that_was_recorded_before_them() -> None:
    layers = [_Experts(), _Experts()]
    recorder = SaliencyRecorder((2, EXPERTS), lambda whole: whole, None)
    recorder.attach(layers)
    rows = PhaseRows(np.ceil(QUOTAS).astype(np.int16), None, None)
    tables = EnforcementTables("threshold", TOP_K, 1, len(QUOTAS), rows, rows, None)
    recorders = ProbeRecorders(saliency=recorder)
    probes = ProbeEnforcement(tables, ProbeRows(QUOTAS), "cpu", None, recorders)
    probes.set_budgets(1, 1)  # as the start does, to see the routing obey
    probes.set_budgets(4, 4)
    # Expert e's output is e + 1 times its input: the heavier slot has the smaller score.
    ids = torch.tensor([[0, 5, 6, 7]])
    slots = RoutedSlots(torch.tensor([[0.4, 0.3, 0.2, 0.1]]), ids, 0)
    for layer in layers:
        layer(torch.ones(1, 2), _Output(slots.weights, slots.ids))
    probes.set_budgets(1, 1)
    assert probes.drop(0, slots).ids.tolist() == [[-1, 5, -1, -1]]
    before = recorder.measured()
    layers[0](torch.ones(1, 2), _Output(slots.weights, slots.ids))
    np.testing.assert_array_equal(recorder.measured(), before)


def test_saliency_is_the_mean_norm_of_each_expert_s_output(tmp_path: Path) -> None:
    layers = [_Experts(), _Experts()]
    recorder = SaliencyRecorder((2, 4), lambda partial: 2 * partial, tmp_path)
    recorder.attach(layers)
    ids = torch.tensor([[0, 2], [2, -1], [0, 2]])
    for layer in layers:
        x = torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]])
        expected = x * torch.tensor([[2.0], [1.5], [2.0]])
        weights = torch.full((3, 2), 0.5) * (ids >= 0)
        assert torch.equal(layer(x, topk_output=_Output(weights, ids)), expected)
    with np.load(tmp_path / "saliency.npz") as record:
        found = saliency_of(record["sums"], record["counts"])
    # Two ranks with half the output each: norms 5, 1 and 10 times the expert's factor.
    np.testing.assert_allclose(found[:, 0], 2 * 7.5)
    np.testing.assert_allclose(found[:, 2], 2 * 16 / 3 * 3)
    typical = (2 * 15 + 2 * 48) / 5
    np.testing.assert_allclose(found[:, [1, 3]], typical)
