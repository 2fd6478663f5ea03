"""Requests of one forward with budgets of their own, in every mode on the host."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from table_factory import make_full_tables

from sglang_alloc.allocation_mode import Mode, Phase
from sglang_alloc.enforcement import EnforcementTables, RoutedSlots
from sglang_alloc.enforcement_host import HostEnforcement
from sglang_alloc.shared_table import SharedTable, publish_shared_table
from sglang_alloc.worker_tables import enforcement_tables

LAYERS, TOP_K, EXPERTS, TOKENS = 3, 4, 16, 12
BUDGET_MIN, BUDGET_MAX = LAYERS, LAYERS * TOP_K
IN_FORCE, CEILING, FLOOR = 7, 4, 10
PROTECTED, CEILED, FLOORED = slice(2, 5), slice(9, 11), slice(0, 2)
MODES: tuple[Mode, ...] = ("layer", "threshold", "token", "union")


def _opening_by_quotas(tables: EnforcementTables) -> EnforcementTables:
    return tables._replace(decode=tables.decode._replace(thresholds=None))


def _with_falling_thresholds(tables: EnforcementTables) -> EnforcementTables:
    """As those of a calibrated table are: the larger the budget, the more passes."""
    of_budgets = np.linspace(0.2, 0.0, BUDGET_MAX - BUDGET_MIN + 1, dtype=np.float32)
    thresholds = np.repeat(of_budgets[:, None], LAYERS, axis=1)
    return tables._replace(
        decode=tables.decode._replace(thresholds=thresholds),
        prefill=tables.prefill._replace(thresholds=thresholds),
    )


def _tables(folder: Path, mode: Mode) -> EnforcementTables:
    publish_shared_table(folder / "full.tbl", make_full_tables(LAYERS, TOP_K, EXPERTS))
    with SharedTable.open(folder / "full.tbl") as table:
        return enforcement_tables(table, mode)


def _make_slots(num_shared: int = 0) -> RoutedSlots:
    generator = torch.Generator().manual_seed(3)
    weights, ids = torch.randn(TOKENS, EXPERTS, generator=generator).softmax(1).topk(TOP_K)
    shared = torch.ones(TOKENS, num_shared), torch.full((TOKENS, num_shared), EXPERTS)
    return RoutedSlots(torch.cat([weights, shared[0]], 1), torch.cat([ids, shared[1]], 1).int(), 1)


def _token_budgets() -> np.ndarray:
    budgets = np.full(TOKENS, IN_FORCE, np.int32)
    budgets[PROTECTED], budgets[CEILED], budgets[FLOORED] = BUDGET_MAX, CEILING, FLOOR
    return budgets


def _dropped(
    tables: EnforcementTables,
    slots: RoutedSlots,
    budgets: np.ndarray | None,
    *,
    in_force: int = IN_FORCE,
    phase: Phase = "decode",
) -> RoutedSlots:
    enforcement = HostEnforcement(tables)
    enforcement.set_budgets(in_force, in_force)
    enforcement.begin_forward(phase, len(slots.ids), budgets)
    assert enforcement.drops_slots()
    return enforcement.drop(1, slots)


def _rows(slots: RoutedSlots, index: slice | np.ndarray) -> RoutedSlots:
    return RoutedSlots(slots.weights[index], slots.ids[index], slots.num_shared)


def _same(found: RoutedSlots, expected: RoutedSlots) -> bool:
    return torch.equal(found.ids, expected.ids) and torch.equal(found.weights, expected.weights)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_protected_request_keeps_every_bit_of_its_routing(
    tmp_path: Path, mode: Mode, phase: Phase
) -> None:
    slots = _make_slots(num_shared=1)
    found = _dropped(_tables(tmp_path, mode), slots, _token_budgets(), phase=phase)
    assert _same(_rows(found, PROTECTED), _rows(slots, PROTECTED))


@pytest.mark.parametrize("mode", ["layer", "threshold", "token"])
def test_the_others_get_what_they_would_get_without_it(tmp_path: Path, mode: Mode) -> None:
    tables, slots, budgets = _tables(tmp_path, mode), _make_slots(1), _token_budgets()
    found = _dropped(tables, slots, budgets)
    for budget in (IN_FORCE, CEILING, FLOOR):
        group = np.flatnonzero(budgets == budget)
        alone = _dropped(tables, _rows(slots, group), None, in_force=budget)
        torch.testing.assert_close(_rows(found, group).weights, alone.weights)
        assert torch.equal(_rows(found, group).ids, alone.ids)


def test_under_union_each_opens_by_its_own_budget_and_may_ride(tmp_path: Path) -> None:
    tables = _opening_by_quotas(_tables(tmp_path, "union"))._replace(saliency=None)
    slots, budgets = _make_slots(1), _token_budgets()
    kept = _dropped(tables, slots, budgets).ids[:, :TOP_K]
    opening = tables.decode.quotas[budgets - BUDGET_MIN, 1]
    opened = {int(e) for row, k0 in zip(slots.ids, opening, strict=True) for e in row[:k0]}
    assert {int(expert) for expert in kept[kept >= 0]} == opened


def test_under_union_each_opens_by_the_threshold_of_its_own_budget(tmp_path: Path) -> None:
    tables = _tables(tmp_path, "union")._replace(saliency=None)
    slots, budgets = _make_slots(1), _token_budgets()
    kept = _dropped(tables, slots, budgets).ids[:, :TOP_K]
    assert tables.decode.thresholds is not None
    limits = tables.decode.thresholds[budgets - BUDGET_MIN, 1]
    opened = set()
    for token, limit in enumerate(limits):
        keeps_all = budgets[token] == BUDGET_MAX
        passing = [s == 0 or keeps_all or slots.weights[token, s] >= limit for s in range(TOP_K)]
        opened |= {int(slots.ids[token, s]) for s in range(TOP_K) if passing[s]}
    assert {int(expert) for expert in kept[kept >= 0]} == opened
    assert len(opened) < len(slots.ids[:, :TOP_K].unique())


@pytest.mark.parametrize("mode", MODES)
def test_a_ceiling_below_a_full_budget_lowers_that_request_alone(
    tmp_path: Path, mode: Mode
) -> None:
    slots = _make_slots(1)
    budgets = np.full(TOKENS, BUDGET_MAX, np.int32)
    budgets[CEILED] = BUDGET_MIN
    found = _dropped(_tables(tmp_path, mode), slots, budgets, in_force=BUDGET_MAX, phase="decode")
    others = np.flatnonzero(budgets == BUDGET_MAX)
    assert _same(_rows(found, others), _rows(slots, others))
    if mode in ("layer", "token"):
        assert int((found.ids[CEILED, :TOP_K] >= 0).sum()) == 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_floor_raises_its_requests_and_takes_nothing_from_the_others(
    tmp_path: Path, mode: Mode, phase: Phase
) -> None:
    tables, slots = _with_falling_thresholds(_tables(tmp_path, mode)), _make_slots(1)
    budgets = np.full(TOKENS, IN_FORCE, np.int32)
    budgets[:6] = FLOOR
    found = _dropped(tables, slots, budgets, phase=phase)
    others = np.flatnonzero(budgets == IN_FORCE)
    alone = _dropped(tables, _rows(slots, others), None, phase=phase)
    kept, kept_alone = _rows(found, others).ids >= 0, alone.ids >= 0
    if tables.mode_of(phase) == "union":
        assert bool((kept | ~kept_alone).all()), "they may ride, and lose nothing"
    else:
        assert torch.equal(kept, kept_alone)
    raised = int((_rows(found, slice(6)).ids >= 0).sum())
    plain = _dropped(tables, slots, None, phase=phase)
    assert raised > int((_rows(plain, slice(6)).ids >= 0).sum())
    if tables.mode_of(phase) in ("layer", "token"):
        assert raised == 6 + 6 * int(tables.quotas_of(phase)[FLOOR - BUDGET_MIN, 1])


@pytest.mark.parametrize("mode", MODES)
def test_a_forward_of_protected_requests_alone_is_untouched(tmp_path: Path, mode: Mode) -> None:
    enforcement, slots = HostEnforcement(_tables(tmp_path, mode)), _make_slots(1)
    enforcement.set_budgets(IN_FORCE, IN_FORCE)
    enforcement.begin_forward("decode", TOKENS, np.full(TOKENS, BUDGET_MAX, np.int32))
    assert not enforcement.drops_slots()
    assert enforcement.drop(0, slots) is slots
    enforcement.begin_forward("decode", TOKENS)
    assert enforcement.drops_slots()


@pytest.mark.parametrize("mode", MODES)
def test_padding_rows_keep_nothing(tmp_path: Path, mode: Mode) -> None:
    slots = _make_slots(1)
    slots.ids[6:8] = -1
    found = _dropped(_tables(tmp_path, mode), slots, _token_budgets())
    assert (found.ids[6:8] == -1).all()
