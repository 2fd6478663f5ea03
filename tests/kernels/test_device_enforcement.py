"""The budget as an accelerator enforces it, by real kernels: against the host, and by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from enforcement_cases import (
    BUDGET_MIN,
    BUDGETS,
    FULL,
    LAYERS,
    MODES,
    TOKENS,
    TOP_K,
    make_slots,
    make_tables,
)

from sglang_alloc.allocation_mode import Phase
from sglang_alloc.enforcement import RoutedSlots
from sglang_alloc.enforcement_device import DeviceEnforcement
from sglang_alloc.enforcement_host import HostEnforcement
from sglang_alloc_kernels.slot_rules import KERNELS


def _on(device: str, slots: RoutedSlots) -> RoutedSlots:
    return RoutedSlots(slots.weights.to(device), slots.ids.to(device), slots.num_shared)


def _make_device(mode: str, device: str) -> DeviceEnforcement:
    return DeviceEnforcement(make_tables(mode), torch.device(device), KERNELS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("num_shared", "renormalize"), [(0, True), (1, True), (0, False)])
def test_device_agrees_with_host_at_every_budget_and_phase(
    mode: str, num_shared: int, renormalize: bool, device: str
) -> None:
    host, ours = HostEnforcement(make_tables(mode)), _make_device(mode, device)
    slots = make_slots(num_shared=num_shared, renormalize=renormalize)
    for budget in BUDGETS:
        phases: tuple[Phase, Phase] = ("decode", "prefill")
        for phase in phases:
            kept = []
            for enforcement, given in ((host, slots), (ours, _on(device, slots))):
                enforcement.set_budgets(budget, budget)
                enforcement.begin_forward(phase, TOKENS)
                kept.append(enforcement.drop(1, given))
            assert torch.equal(kept[1].ids.cpu(), kept[0].ids)
            torch.testing.assert_close(kept[1].weights.cpu(), kept[0].weights)


@pytest.mark.parametrize("mode", MODES)
def test_slots_in_any_layout_are_dropped_alike(mode: str, device: str) -> None:
    """A router may return columns of a wider tensor, or a transposed one."""
    ours, slots = _make_device(mode, device), _on(device, make_slots())
    ours.set_budgets(5, 5)
    ours.begin_forward("decode", TOKENS)
    expected = ours.drop(1, slots)
    wide = [torch.cat([part, part], dim=1)[:, :TOP_K] for part in slots[:2]]
    turned = [part.t().contiguous().t() for part in slots[:2]]
    for weights, ids in (wide, turned):
        kept = ours.drop(1, RoutedSlots(weights, ids, 0))
        assert torch.equal(kept.ids, expected.ids)
        assert torch.equal(kept.weights, expected.weights)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("corrected", [True, False])
def test_a_nan_slot_falls_alike_on_host_and_device(mode: str, corrected: bool, device: str) -> None:
    """Rows of NaN in part: among the best, among the worst, all but one; and one of NaN alone."""
    tables = make_tables(mode)
    if not corrected:
        rows = [
            one._replace(gains=None, references=None) for one in (tables.prefill, tables.decode)
        ]
        tables = tables._replace(prefill=rows[0], decode=rows[1])
    slots = make_slots()
    for row, columns in ((1, [0]), (3, [5]), (4, [0, 1, 2, 4, 5]), (6, list(range(TOP_K)))):
        slots.weights[row, columns] = float("nan")
    ours = DeviceEnforcement(tables, torch.device(device), KERNELS)
    kept = []
    for enforcement, given in ((HostEnforcement(tables), slots), (ours, _on(device, slots))):
        enforcement.set_budgets(5, 5)
        enforcement.begin_forward("decode", TOKENS)
        kept.append(enforcement.drop(1, given))
    assert torch.equal(kept[1].ids.cpu(), kept[0].ids)
    torch.testing.assert_close(kept[1].weights.cpu(), kept[0].weights, equal_nan=True)
    assert tables.saliency is not None
    weighed = torch.from_numpy(tables.saliency)[1][slots.ids] * slots.weights
    scored = (weighed if tables.ranks_by_saliency("decode") else slots.weights).clone()
    scored[slots.weights.isnan()] = -torch.inf
    best = scored.argmax(dim=1, keepdim=True)
    assert (kept[0].ids.gather(1, best) >= 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_full_budget_changes_no_bit(mode: str, device: str) -> None:
    ours, slots = _make_device(mode, device), _on(device, make_slots())
    ours.begin_forward("decode", TOKENS)
    kept = ours.drop(0, slots)
    assert torch.equal(kept.ids, slots.ids)
    assert torch.equal(kept.weights, slots.weights)


@pytest.mark.parametrize("mode", MODES)
def test_padding_rows_light_no_expert_and_leave_the_others_alone(mode: str, device: str) -> None:
    """A captured batch of eleven rows replayed for seven tokens."""
    ours, slots = _make_device(mode, device), _on(device, make_slots(num_shared=1))
    ours.set_budgets(5, 5)
    ours.begin_forward("decode", 7)
    padded = ours.drop(0, slots)
    assert (padded.ids[7:] == -1).all()
    assert not padded.weights[7:].any()
    alone = ours.drop(0, RoutedSlots(slots.weights[:7], slots.ids[:7], 1))
    assert torch.equal(padded.ids[:7], alone.ids)


@pytest.mark.parametrize("mode", MODES)
def test_a_change_of_budget_phase_or_batch_moves_no_tensor(mode: str, device: str) -> None:
    ours, slots = _make_device(mode, device), _on(device, make_slots())
    before = ours.addresses()
    counts = []
    for budget, phase, tokens in ((FULL, "decode", 11), (5, "prefill", 11), (5, "decode", 4)):
        ours.set_budgets(budget, budget)
        ours.begin_forward(phase, tokens)
        counts.append(int((ours.drop(1, slots).ids >= 0).sum()))
    assert ours.addresses() == before
    assert counts[0] == TOKENS * TOP_K > counts[1] > counts[2] > 0


def test_what_was_kept_is_measured_by_phase_and_read_without_waiting(device: str) -> None:
    ours, slots = _make_device("layer", device), _on(device, make_slots())
    ours.prepare(slots, 4)  # leaves traces, as capture does
    assert ours.measurements() == {}
    ours.set_budgets(4, 8)
    for phase, tokens in (("prefill", 11), ("decode", 3), ("decode", 3)):
        ours.begin_forward(phase, tokens)
        distinct = [len(ours.drop(layer, slots).ids.unique()) for layer in range(LAYERS)]
    ours.ask_for_measurements()
    if device != "cpu":
        torch.cuda.synchronize()
    measured = ours.measurements()
    assert measured["prefill"].activations_per_token() == 4
    assert measured["decode"].activations_per_token() == 8
    assert measured["decode"].sampled_forwards == 2
    assert measured["decode"].tokens == 6
    lit = sum(distinct) - LAYERS  # the padding's -1 is no expert
    assert measured["decode"].distinct_experts == 2 * lit
    ratio = measured["decode"].kept_mass_ratio()
    expected = slots.weights[:3].sort(descending=True).values[:, :4].sum() / 3
    assert ratio == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_protected_request_keeps_every_bit_and_the_others_their_budget(
    mode: str, device: str
) -> None:
    ours, slots = _make_device(mode, device), _on(device, make_slots(num_shared=1))
    ours.set_budgets(5, 5)
    budgets = np.full(TOKENS, 5, np.int32)
    budgets[3:5] = FULL
    ours.begin_forward("decode", TOKENS, budgets)
    kept = ours.drop(1, slots)
    assert torch.equal(kept.ids[3:5], slots.ids[3:5])
    assert torch.equal(kept.weights[3:5], slots.weights[3:5])
    host = HostEnforcement(make_tables(mode))
    host.set_budgets(5, 5)
    host.begin_forward("decode", TOKENS, budgets)
    expected = host.drop(1, RoutedSlots(slots.weights.cpu(), slots.ids.cpu(), 1))
    assert torch.equal(kept.ids.cpu(), expected.ids)
    torch.testing.assert_close(kept.weights.cpu(), expected.weights)
    ours.begin_forward("decode", TOKENS)
    assert int((ours.drop(1, slots).ids < 0).sum()) > int((kept.ids < 0).sum())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_floor_adds_its_requests_best_slots_and_takes_none_from_the_others(
    mode: str, phase: Phase, device: str
) -> None:
    """Seven activations of two layers: four slots in each, beside what the rule keeps."""
    ours, slots = _make_device(mode, device), _on(device, make_slots(num_shared=1))
    budgets = np.full(TOKENS, 5, np.int32)
    budgets[3:5] = 7
    ours.set_budgets(5, 5)
    ours.begin_forward(phase, TOKENS)
    plain = [ours.drop(layer, slots).ids >= 0 for layer in range(LAYERS)]
    ours.begin_forward(phase, TOKENS, budgets)
    kept = [ours.drop(layer, slots).ids >= 0 for layer in range(LAYERS)]
    others = np.flatnonzero(budgets == 5)
    rides = mode.startswith("union") and phase == "decode"
    for before, after in zip(plain, kept, strict=True):
        assert bool((after | ~before).all())
        assert rides or torch.equal(after[others], before[others])
        raised = after[3:5, :TOP_K].sum(dim=1)
        assert bool((raised >= 4).all())
        if mode == "layer":
            assert raised.tolist() == [4, 4]


@pytest.mark.parametrize("mode", ["layer", "threshold", "token"])
def test_a_ceiling_leaves_the_others_what_the_host_gives_them(mode: str, device: str) -> None:
    """Its request scores highest, so it would win slots of which its ceiling then takes most."""
    tables, slots = make_tables(mode), make_slots()
    slots.weights[2] += 1.0
    budgets = np.full(TOKENS, 5, np.int32)
    budgets[2] = BUDGET_MIN
    kept = []
    ours = DeviceEnforcement(tables, torch.device(device), KERNELS)
    for enforcement, given in ((HostEnforcement(tables), slots), (ours, _on(device, slots))):
        enforcement.set_budgets(5, 5)
        enforcement.begin_forward("decode", TOKENS, budgets)
        kept.append(enforcement.drop(1, given).ids.cpu())
    others = torch.arange(TOKENS) != 2
    assert torch.equal(kept[1][others], kept[0][others])
    assert int((kept[1][2] >= 0).sum()) == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_ceiling_holds_in_every_layer_and_for_its_request_alone(mode: str, device: str) -> None:
    ours, slots = _make_device(mode, device), _on(device, make_slots())
    budgets = np.full(TOKENS, FULL, np.int32)
    budgets[2] = 2 * LAYERS
    before = ours.addresses()
    ours.begin_forward("decode", TOKENS, budgets)
    kept = ours.drop(0, slots)
    counts = (kept.ids >= 0).sum(dim=1).tolist()
    assert counts == [TOP_K, TOP_K, 2, *[TOP_K] * (TOKENS - 3)]
    ours.begin_forward("decode", TOKENS)
    assert torch.equal(ours.drop(0, slots).ids, slots.ids)
    assert ours.addresses() == before
