"""Mode `union` on the host: the tokens of a decode step share a set of experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from table_factory import make_full_tables, make_tables

from sglang_alloc.enforcement import EnforcementTables, RoutedSlots
from sglang_alloc.enforcement_host import HostEnforcement
from sglang_alloc.shared_table import SharedTable, publish_shared_table
from sglang_alloc.worker_tables import enforcement_tables
from sglang_alloc_kernels.reference_mass import reference_factor_torch
from sglang_alloc_kernels.score_threshold import score_threshold_torch
from sglang_alloc_kernels.union_selection import opened_selection_torch, union_selection_torch

LAYERS, TOP_K, EXPERTS, TOKENS = 3, 4, 16, 12
BUDGET_MIN, BUDGET_MAX = LAYERS, LAYERS * TOP_K


@pytest.fixture
def tables(tmp_path: Path) -> EnforcementTables:
    """Tables without thresholds of the mode: each token's best slots open the set."""
    full = make_full_tables(LAYERS, TOP_K, EXPERTS)
    without = replace(full, union_thresholds=None, union_references=None)
    publish_shared_table(tmp_path / "union.tbl", without)
    with SharedTable.open(tmp_path / "union.tbl") as table:
        return enforcement_tables(table, "union")


@pytest.fixture
def calibrated(tmp_path: Path) -> EnforcementTables:
    """Tables whose thresholds say which slots open the set, and with references."""
    full = make_full_tables(LAYERS, TOP_K, EXPERTS)
    thresholds = np.linspace(0.4, 0.0, len(full.budgets), dtype=np.float32)[:, None]
    thresholds = thresholds * np.array([1.0, 0.5, 0.8], np.float32)
    publish_shared_table(tmp_path / "calibrated.tbl", replace(full, union_thresholds=thresholds))
    with SharedTable.open(tmp_path / "calibrated.tbl") as table:
        return enforcement_tables(table, "union")


def _make_slots(num_tokens: int = TOKENS, padding: int = 0) -> RoutedSlots:
    generator = torch.Generator().manual_seed(5)
    weights, ids = torch.randn(num_tokens, EXPERTS, generator=generator).softmax(1).topk(TOP_K)
    ids[num_tokens - padding :] = -1
    return RoutedSlots(weights, ids.int(), 0)


def _decoded(tables: EnforcementTables, budget: int, slots: RoutedSlots) -> RoutedSlots:
    enforcement = HostEnforcement(tables)
    enforcement.set_budgets(BUDGET_MAX, budget)
    enforcement.begin_forward("decode")
    return enforcement.drop(1, slots)


@pytest.mark.parametrize("padding", [0, 3])
def test_decode_keeps_what_the_kernels_twin_keeps_at_every_budget(
    tables: EnforcementTables, padding: int
) -> None:
    slots = _make_slots(padding=padding)
    assert tables.saliency is not None
    saliency = torch.from_numpy(np.array(tables.saliency))[1]
    scores = slots.weights * saliency[slots.ids.clamp(min=0)]
    for budget in range(BUDGET_MIN, BUDGET_MAX):
        opening = int(tables.decode.quotas[budget - BUDGET_MIN, 1])
        expected = union_selection_torch(scores, slots.ids, opening, EXPERTS)
        kept = _decoded(tables, budget, slots)
        assert torch.equal(kept.ids >= 0, expected)
        assert torch.equal(kept.weights, slots.weights.masked_fill(~expected, 0.0))


@pytest.mark.parametrize("padding", [0, 3])
def test_slots_that_pass_the_threshold_open_the_set(
    calibrated: EnforcementTables, padding: int
) -> None:
    slots = _make_slots(padding=padding)
    assert calibrated.saliency is not None
    assert calibrated.decode.thresholds is not None
    assert calibrated.decode.references is not None
    saliency = torch.from_numpy(np.array(calibrated.saliency))[1]
    scores = slots.weights * saliency[slots.ids.clamp(min=0)]
    riding = 0
    for budget in range(BUDGET_MIN, BUDGET_MAX):
        row = budget - BUDGET_MIN
        opening = score_threshold_torch(scores, float(calibrated.decode.thresholds[row, 1]))
        expected = opened_selection_torch(scores, slots.ids, opening, EXPERTS)
        reference = int(calibrated.decode.references[row, 1])
        factor = reference_factor_torch(slots.weights, expected, scores, reference)
        kept = _decoded(calibrated, budget, slots)
        assert torch.equal(kept.ids >= 0, expected)
        assert (kept.ids >= 0).any(dim=1)[: TOKENS - padding].all(), "a token lost every slot"
        torch.testing.assert_close(kept.weights, slots.weights.masked_fill(~expected, 0.0) * factor)
        riding += int((expected & ~opening).sum())
    assert riding > 0


def test_thresholds_keep_at_least_what_mode_threshold_keeps(calibrated: EnforcementTables) -> None:
    alone = calibrated._replace(mode="threshold", prefill_mode=None)
    slots = _make_slots()
    for budget in range(BUDGET_MIN, BUDGET_MAX):
        together = _decoded(calibrated, budget, slots).ids >= 0
        passing = _decoded(alone, budget, slots).ids >= 0
        assert (together | ~passing).all()
        kept, opened = slots.ids[together].unique(), slots.ids[passing].unique()
        assert torch.equal(kept, opened), "a step reads another set of experts"


def test_the_set_holds_each_tokens_opening_slots_and_nothing_else(
    tables: EnforcementTables,
) -> None:
    slots = _make_slots()
    tables = tables._replace(saliency=None)
    kept = _decoded(tables, BUDGET_MIN, slots).ids
    opened = slots.ids[:, :1].unique()
    assert torch.equal(kept[kept >= 0].unique(), opened)
    assert len(opened) < len(slots.ids.unique())
    assert ((kept >= 0).sum(dim=1) > 1).any(), "no slot rides on what others opened"


def test_padding_rows_open_no_expert(tables: EnforcementTables) -> None:
    padded = _make_slots(padding=TOKENS - 2)
    kept = _decoded(tables, BUDGET_MIN, padded)
    alone = _decoded(tables, BUDGET_MIN, RoutedSlots(padded.weights[:2], padded.ids[:2], 0))
    assert (kept.ids[2:] == -1).all()
    assert torch.equal(kept.ids[:2], alone.ids)


def test_one_token_alone_keeps_what_it_opens(tables: EnforcementTables) -> None:
    slots = _make_slots(1)
    for budget in range(BUDGET_MIN, BUDGET_MAX):
        kept = _decoded(tables, budget, slots).ids
        assert int((kept >= 0).sum()) == tables.decode.quotas[budget - BUDGET_MIN, 1]


def test_a_full_budget_returns_the_same_object(tables: EnforcementTables) -> None:
    slots = _make_slots()
    assert _decoded(tables, BUDGET_MAX, slots) is slots


def test_prefill_obeys_the_best_mode_of_the_table(tmp_path: Path) -> None:
    publish_shared_table(tmp_path / "full.tbl", make_full_tables())
    with SharedTable.open(tmp_path / "full.tbl") as full:
        tables = enforcement_tables(full, "union")
        as_threshold = enforcement_tables(full, "threshold").prefill
    assert (tables.mode_of("decode"), tables.mode_of("prefill")) == ("union", "threshold")
    assert tables.decode.gains is None
    assert tables.decode.references is not None
    assert np.array_equal(tables.decode.references, make_full_tables().arrays()["union_references"])
    for found, expected in zip(tables.prefill, as_threshold, strict=True):
        assert np.array_equal(found, expected)
    plain = make_tables(union_quotas=make_tables().quotas, union_predicted_loss=np.zeros(10))
    publish_shared_table(tmp_path / "plain.tbl", plain)
    with SharedTable.open(tmp_path / "plain.tbl") as table:
        assert enforcement_tables(table, "union").mode_of("prefill") == "layer"


def test_a_prefill_decides_each_token_alone(tables: EnforcementTables) -> None:
    enforcement = HostEnforcement(tables)
    enforcement.set_budgets(BUDGET_MIN + 2, BUDGET_MAX)
    enforcement.begin_forward("prefill")
    slots = _make_slots()
    together = enforcement.drop(0, slots).ids
    one_by_one = [
        enforcement.drop(0, RoutedSlots(slots.weights[i : i + 1], slots.ids[i : i + 1], 0)).ids
        for i in range(TOKENS)
    ]
    assert torch.equal(together, torch.cat(one_by_one))
    enforcement.begin_forward("decode")
    assert enforcement.drop(0, slots) is slots
