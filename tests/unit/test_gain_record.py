"""Gains inside the engine, against layers whose outputs can be told by hand."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from sglang_alloc.enforcement import EnforcementTables, PhaseRows, RoutedSlots
from sglang_alloc.enforcement_probe import ProbeEnforcement, ProbeRecorders, ProbeRows
from sglang_alloc.gain_record import GainRecorder

TOP_K, EXPERTS, LAYERS = 2, 4, 2


class _Output(NamedTuple):
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor


class _Experts(torch.nn.Module):
    """Expert e multiplies by e + 1, over its input as the Triton kernels do; -1 adds nothing."""

    def forward(self, hidden_states: torch.Tensor, topk_output: _Output) -> torch.Tensor:
        factor = (topk_output.topk_weights * (topk_output.topk_ids + 1)).sum(1, keepdim=True)
        return hidden_states.mul_(factor)


WEIGHTS = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.9, 0.1]])
IDS = torch.tensor([[0, 2], [1, 3], [2, 0]])
STATES = torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]])


def _probes(
    folder: Path | None, layers: list[_Experts], gains: list[float], reference: int = TOP_K
) -> ProbeEnforcement:
    """Probe 1 keeps one slot, probe 2 is the full model."""
    quotas = np.array([[1.0] * LAYERS, [2.0] * LAYERS], np.float32)
    rows = PhaseRows(quotas.astype(np.int16), None, None)
    tables = EnforcementTables("threshold", TOP_K, 1, 2, rows, rows, None)
    recorder = GainRecorder(LAYERS, lambda partial: 2 * partial, folder)
    recorder.attach(layers)
    references = np.array([[reference] * LAYERS, [TOP_K] * LAYERS], np.int16)
    given = ProbeRows(quotas, references, np.array([gains, [1.0] * LAYERS], np.float32))
    return ProbeEnforcement(tables, given, "cpu", None, ProbeRecorders(gains=recorder))


def _forward(probes: ProbeEnforcement, layers: list[_Experts], num_shared: int = 0) -> list[object]:
    """Route and run each layer; return the outputs."""
    shared = torch.ones(len(WEIGHTS), num_shared)
    weights = torch.cat([WEIGHTS, shared], 1)
    ids = torch.cat([IDS, EXPERTS * shared.long()], 1)
    outputs = []
    for index, layer in enumerate(layers):
        kept = probes.drop(index, RoutedSlots(weights, ids, num_shared))
        outputs.append(layer(STATES.clone(), _Output(kept.weights, kept.ids)))
    return outputs


def _expected_gain() -> float:
    full = STATES * (WEIGHTS * (IDS + 1)).sum(1, keepdim=True)
    kept = STATES * (WEIGHTS[:, :1] * (IDS[:, :1] + 1))
    return float((full * kept).sum() / (kept * kept).sum())


@pytest.mark.parametrize("num_shared", [0, 1])
def test_a_gain_is_the_least_squares_factor_between_kept_and_full(
    tmp_path: Path, num_shared: int
) -> None:
    layers = [_Experts(), _Experts()]
    probes = _probes(tmp_path, layers, [0.0, 0.0])
    probes.set_budgets(1, 1)
    outputs = _forward(probes, layers, num_shared)
    probes.set_budgets(2, 2)
    with np.load(tmp_path / "gains-1.npz") as record:
        np.testing.assert_allclose(record["gains"], _expected_gain(), rtol=1e-6)
    kept = WEIGHTS[:, :1] * (IDS[:, :1] + 1) * _expected_gain()
    # The shared expert, number 4, multiplies by 5 whatever was dropped.
    torch.testing.assert_close(outputs[0], STATES * (kept + 5 * num_shared))


def test_gains_add_up_over_the_forwards_of_a_probe(tmp_path: Path) -> None:
    layers = [_Experts(), _Experts()]
    probes = _probes(tmp_path, layers, [0.0, 0.0])
    probes.set_budgets(1, 1)
    first = _forward(probes, layers)
    second = _forward(probes, layers)
    torch.testing.assert_close(first[1], second[1])
    probes.set_budgets(2, 2)
    probes.set_budgets(1, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gains-1.npz"]


def test_a_gain_of_one_leaves_the_output_as_it_is(tmp_path: Path) -> None:
    layers = [_Experts(), _Experts()]
    probes = _probes(tmp_path, layers, [1.0, 1.0])
    probes.set_budgets(1, 1)
    outputs = _forward(probes, layers)
    torch.testing.assert_close(outputs[0], STATES * WEIGHTS[:, :1] * (IDS[:, :1] + 1))
    probes.set_budgets(2, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_full_probe_is_not_observed(tmp_path: Path) -> None:
    layers = [_Experts(), _Experts()]
    probes = _probes(tmp_path, layers, [0.0, 0.0])
    probes.set_budgets(2, 2)
    _forward(probes, layers)
    probes.set_budgets(1, 1)
    assert list(tmp_path.iterdir()) == []


def test_other_ranks_apply_gains_and_write_nothing(tmp_path: Path) -> None:
    layers = [_Experts(), _Experts()]
    probes = _probes(None, layers, [0.0, 0.0])
    probes.set_budgets(1, 1)
    outputs = _forward(probes, layers)
    probes.set_budgets(2, 2)
    expected = STATES * WEIGHTS[:, :1] * (IDS[:, :1] + 1) * _expected_gain()
    torch.testing.assert_close(outputs[1], expected)


def test_a_reference_normalises_by_more_slots_than_were_kept() -> None:
    layers = [_Experts(), _Experts()]
    probes = _probes(None, layers, [1.0, 1.0], reference=1)
    probes.set_budgets(1, 1)
    kept = probes.drop(0, RoutedSlots(WEIGHTS, IDS, 0))
    torch.testing.assert_close(kept.weights[:, 0], torch.ones(3))
