"""On a GPU alone: what a captured graph replays obeys budgets and batches that came later."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from enforcement_cases import (
    BUDGET_MIN,
    BUDGETS,
    EXPERTS,
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
from sglang_alloc_kernels.budgeted_routing import Router
from sglang_alloc_kernels.slot_rules import KERNELS, TWINS

CUDA = torch.device("cuda")


def _captured(
    enforcement: DeviceEnforcement, slots: RoutedSlots, phase: Phase
) -> tuple[torch.cuda.CUDAGraph, list[RoutedSlots]]:
    """Capture the drop of all layers at the full budget, as SGLang captures its forwards."""
    enforcement.prepare(slots, TOKENS)
    enforcement.begin_capture(phase)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [enforcement.drop(layer, slots) for layer in range(LAYERS)]
    return graph, kept


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_replayed_graph_equals_the_twins_at_every_later_budget_and_batch(
    mode: str, phase: Phase
) -> None:
    slots = make_slots(num_shared=1)
    on_gpu = RoutedSlots(slots.weights.to(CUDA), slots.ids.to(CUDA), 1)
    ours = DeviceEnforcement(make_tables(mode), CUDA, KERNELS)
    twin = DeviceEnforcement(make_tables(mode), torch.device("cpu"), TWINS)
    graph, kept = _captured(ours, on_gpu, phase)
    for budget in BUDGETS:
        for tokens in (TOKENS, 7, 1):
            for enforcement in (ours, twin):
                enforcement.set_budgets(budget, budget)
                enforcement.begin_forward(phase, tokens)
            graph.replay()
            for layer in range(LAYERS):
                expected = twin.drop(layer, slots)
                assert torch.equal(kept[layer].ids.cpu(), expected.ids)
                torch.testing.assert_close(kept[layer].weights.cpu(), expected.weights)
    ours.ask_for_measurements()
    twin.ask_for_measurements()
    torch.cuda.synchronize()
    found, expected_counts = ours.measurements()[phase], twin.measurements()[phase]
    for name in ("forwards", "tokens", "activations", "distinct_experts"):
        assert getattr(found, name) == getattr(expected_counts, name)


@pytest.mark.parametrize("mode", MODES)
def test_steps_that_are_queued_ahead_under_changing_budgets_each_keep_their_own(mode: str) -> None:
    """As calm steps and others do: the host is done with all of them before the first one ends."""
    slots = make_slots()
    on_gpu = RoutedSlots(slots.weights.to(CUDA), slots.ids.to(CUDA), 0)
    ours = DeviceEnforcement(make_tables(mode), CUDA, KERNELS)
    graph, kept = _captured(ours, on_gpu, "decode")
    torch.cuda._sleep(100_000_000)  # device cycles, a twentieth of a second or so
    counts = []
    for budget in (BUDGET_MIN, FULL, FULL) * 20:
        ours.set_budgets(budget, budget)
        ours.begin_forward("decode", TOKENS)
        graph.replay()
        counts.append(torch.stack([(one.ids >= 0).sum() for one in kept]).sum())
    found = torch.stack(counts).view(20, 3).cpu()
    assert (found[:, 1:] == LAYERS * TOKENS * TOP_K).all()
    assert (found[:, 0] == found[0, 0]).all()
    assert found[0, 0] < LAYERS * TOKENS * TOP_K


@pytest.mark.parametrize("mode", MODES)
def test_a_replayed_graph_obeys_the_own_budgets_of_each_later_forward(mode: str) -> None:
    """Seven tokens in a batch captured for eleven; whose request has which budget changes."""
    slots = make_slots(num_shared=1)
    on_gpu = RoutedSlots(slots.weights.to(CUDA), slots.ids.to(CUDA), 1)
    ours = DeviceEnforcement(make_tables(mode), CUDA, KERNELS)
    twin = DeviceEnforcement(make_tables(mode), torch.device("cpu"), TWINS)
    graph, kept = _captured(ours, on_gpu, "decode")
    addresses = ours.addresses()
    forwards: tuple[dict[int, int], ...] = (
        *({}, {3: FULL}, {0: FULL, 5: BUDGET_MIN}, {6: BUDGET_MIN}, {4: 8, 6: FULL}, {}),
    )
    slots_of = {FULL: (TOP_K, TOP_K), 8: (8 // LAYERS, TOP_K), BUDGET_MIN: (1, 1)}
    for own in forwards:
        budgets = np.array([own.get(token, 5) for token in range(7)], np.int32) if own else None
        for enforcement in (ours, twin):
            enforcement.set_budgets(5, 5)
            enforcement.begin_forward("decode", 7, budgets)
        graph.replay()
        for layer in range(LAYERS):
            expected = twin.drop(layer, slots)
            assert torch.equal(kept[layer].ids.cpu(), expected.ids)
            torch.testing.assert_close(kept[layer].weights.cpu(), expected.weights)
            for token, budget in own.items():
                mine = int((kept[layer].ids[token, :TOP_K] >= 0).sum())
                least, most = slots_of[budget]
                assert least <= mine <= most
    assert ours.addresses() == addresses


@pytest.mark.parametrize("mode", MODES)
def test_a_replayed_graph_of_our_routing_equals_the_twins(mode: str) -> None:
    logits = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(2))
    router, on_gpu = Router(TOP_K, "softmax", False), logits.to(CUDA)
    ours = DeviceEnforcement(make_tables(mode), CUDA, KERNELS)
    twin = DeviceEnforcement(make_tables(mode), torch.device("cpu"), TWINS)
    ours.route(LAYERS - 1, on_gpu, router)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [ours.route(layer, on_gpu, router) for layer in range(LAYERS)]
    for budget in BUDGETS:
        for tokens in (TOKENS, 7):
            for enforcement in (ours, twin):
                enforcement.set_budgets(budget, budget)
                enforcement.begin_forward("decode", tokens)
            graph.replay()
            for layer in range(LAYERS):
                expected = twin.route(layer, logits, router)
                assert torch.equal(kept[layer].ids.cpu(), expected.ids)
                torch.testing.assert_close(kept[layer].weights.cpu(), expected.weights)


def test_a_replay_is_asked_for_its_counts_without_waiting() -> None:
    """The copy is queued behind the replay: what is read at once is empty or whole, never torn."""
    slots = make_slots()
    on_gpu = RoutedSlots(slots.weights.to(CUDA), slots.ids.to(CUDA), 0)
    ours = DeviceEnforcement(make_tables("layer"), CUDA, KERNELS)
    graph, _ = _captured(ours, on_gpu, "decode")
    ours.set_budgets(4, 4)
    ours.begin_forward("decode", TOKENS)
    graph.replay()
    ours.ask_for_measurements()
    early = ours.measurements()
    assert early == {} or early["decode"].tokens == TOKENS
    torch.cuda.synchronize()
    assert ours.measurements()["decode"].activations_per_token() == 4
