"""Floors and ceilings of a device: at fixed addresses for graphs, anywhere for larger forwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_alloc import device_bounds
from sglang_alloc.device_bounds import DeviceBounds
from sglang_alloc.enforcement import EnforcementTables, PhaseRows
from sglang_alloc.errors import UnsupportedServerError

ROWS = 8


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch) -> DeviceBounds:
    monkeypatch.setattr(device_bounds, "GRAPH_ROWS", ROWS)
    rows = PhaseRows(np.ones((7, 2), np.int16), None, None)
    return DeviceBounds(EnforcementTables("layer", 4, 2, 8, rows, rows, None), torch.device("cpu"))


def _values(bounds: DeviceBounds, num_rows: int) -> tuple[list[int], list[int]]:
    floors, ceilings = bounds.of(num_rows)
    return floors.tolist(), ceilings.tolist()


def test_full_is_a_floor_and_less_is_a_ceiling_in_slots_per_layer(bounds: DeviceBounds) -> None:
    bounds.load(np.array([6, 8, 5, 2], np.int32), in_force=6)
    floors, ceilings = _values(bounds, 4)
    assert floors == [0, 4, 0, 0, *[0] * 4]
    assert ceilings == [4, 4, 2, 1, *[4] * 4]


def test_a_budget_above_the_one_in_force_is_a_floor_rounded_up_to_whole_slots(
    bounds: DeviceBounds,
) -> None:
    """Two layers of top-4: 3 activations take 2 slots in each of them, 7 take all 4."""
    bounds.load(np.array([2, 3, 4, 5, 6, 7, 8], np.int32), in_force=2)
    assert _values(bounds, 7) == ([0, 2, 2, 3, 3, 4, 4, 0], [4] * ROWS)


def test_bounds_are_forgotten_with_their_forward(bounds: DeviceBounds) -> None:
    before = [part.data_ptr() for part in bounds.of(1)]
    bounds.load(np.array([8, 2], np.int32), in_force=6)
    bounds.load(None, in_force=6)
    assert _values(bounds, 2) == ([0] * ROWS, [4] * ROWS)
    assert [part.data_ptr() for part in bounds.of(1)] == before


def test_a_smaller_forward_leaves_nothing_of_the_larger_one_before_it(
    bounds: DeviceBounds,
) -> None:
    """Rows behind its tokens may be those of a captured batch, and so must not be bound."""
    bounds.load(np.array([8, 2, 8, 2, 8, 2], np.int32), in_force=6)
    bounds.load(np.array([6, 8], np.int32), in_force=6)
    assert _values(bounds, 2) == ([0, 4, *[0] * 6], [4] * ROWS)
    bounds.load(np.full(ROWS + 3, 2, np.int32), in_force=6)
    bounds.load(None, in_force=6)
    assert _values(bounds, 2) == ([0] * ROWS, [4] * ROWS)


def test_no_graph_is_captured_on_tensors_that_the_next_forward_gives_away(
    bounds: DeviceBounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_bounds, "is_capturing", lambda device: True)
    assert bounds.of(ROWS)[0].data_ptr() == bounds.of(1)[0].data_ptr()
    with pytest.raises(UnsupportedServerError, match=rf"graph of {ROWS + 1} rows .*at most {ROWS}"):
        bounds.of(ROWS + 1)


def test_a_forward_larger_than_any_graph_has_tensors_of_its_own(bounds: DeviceBounds) -> None:
    budgets = np.full(ROWS + 3, 6, np.int32)
    budgets[-1] = 8
    bounds.load(budgets, in_force=6)
    assert _values(bounds, ROWS + 3)[0] == [*[0] * (ROWS + 2), 4]
    assert _values(bounds, 2) == ([0] * ROWS, [4] * ROWS)
    bounds.load(None, in_force=6)
    assert _values(bounds, ROWS + 3) == ([0] * (ROWS + 3), [4] * (ROWS + 3))
