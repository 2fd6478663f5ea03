"""Edge cases that every rule on routed slots must survive, each with the reason it is here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from sglang_alloc_kernels.layer_rows import LayerRows, StepTensors
from sglang_alloc_kernels.step_statistics import make_step_sums

NUM_LAYERS, LAYER = 3, 1
NAN = float("nan")


@dataclass(frozen=True)
class SlotCase:
    """One shape of routed slots, with what is odd about it.

    distinct_weights: how many values weights are drawn from; few make ties. padding: trailing rows
    that the step declares padding. absent: share of slots that are -1 already.
    """

    name: str
    reason: str
    tokens: int = 9
    top_k: int = 6
    num_experts: int = 60
    num_shared: int = 0
    distinct_weights: int = 1000
    padding: int = 0
    absent: float = 0.0
    nan_rows: tuple[int, ...] = ()
    nan_slots: tuple[tuple[int, int], ...] = ()
    weights_dtype: torch.dtype = torch.float32
    ids_dtype: torch.dtype = torch.int32


CASES = (
    SlotCase("one token", "decode at batch 1: one program, all else is masked", tokens=1),
    SlotCase("no token", "an idle rank: nothing to launch", tokens=0),
    SlotCase("all padding", "a captured batch without a request lights no expert", padding=9),
    SlotCase("some padding", "a captured batch is rarely full", padding=4),
    SlotCase("ties", "equal scores must fall alike on every rank", distinct_weights=3),
    SlotCase("one value", "every decision is a tie", distinct_weights=1),
    SlotCase("a row of NaN", "a broken request must not change its neighbours", nan_rows=(2,)),
    SlotCase("a NaN slot", "NaN compares false with everything", nan_slots=((0, 0), (3, 4))),
    SlotCase("absent slots", "an earlier step may have dropped some", absent=0.3),
    SlotCase("shared experts", "their columns are no part of the budget", num_shared=2),
    SlotCase("K = E", "every token uses every expert", top_k=8, num_experts=8),
    SlotCase("K = 1", "the best slot is the only one", top_k=1),
    SlotCase("256 experts", "DeepSeek-V3's width", top_k=8, num_experts=256),
    SlotCase("512 experts, K = 10", "the widest routers; K is no power of two", 5, 10, 512),
    SlotCase("E no power of two", "160 experts, as in DeepSeek-V2", top_k=6, num_experts=160),
    SlotCase(
        "bfloat16 weights", "some routers return the model's type", weights_dtype=torch.bfloat16
    ),
    SlotCase("int64 ids", "SGLang's native routing returns them", ids_dtype=torch.int64),
    SlotCase("several programs", "more tokens than one program ranks", tokens=37, padding=3),
)


def make_slots(case: SlotCase, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw weights and ids (T, K + shared) of a case, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    shape = (case.tokens, case.top_k)
    steps = torch.randint(1, case.distinct_weights + 1, shape, generator=generator)
    weights = steps.float() / case.distinct_weights / case.top_k
    order = torch.rand(case.tokens, case.num_experts, generator=generator).argsort(dim=1)
    ids = order[:, : case.top_k].clone()
    ids[torch.rand(shape, generator=generator) < case.absent] = -1
    weights[list(case.nan_rows)] = NAN
    for token, slot in case.nan_slots:
        weights[token, slot] = NAN
    shared = torch.arange(case.num_experts, case.num_experts + case.num_shared)
    ids = torch.cat((ids, shared.expand(case.tokens, -1)), dim=1)
    weights = torch.cat((weights, torch.ones(case.tokens, case.num_shared)), dim=1)
    return weights.to(case.weights_dtype), ids.to(case.ids_dtype)


def make_rows(
    case: SlotCase,
    limit: float,
    *,
    cap: float | None = None,
    gain: float | None = None,
    reference: float | None = None,
    saliency: bool = False,
) -> LayerRows:
    """Return rows whose tested layer has these values and whose others have different ones."""

    def row(value: float | None) -> torch.Tensor | None:
        if value is None:
            return None
        values = torch.full((NUM_LAYERS,), 3.0)
        values[LAYER] = value
        return values

    limits = row(limit)
    assert limits is not None
    table = torch.rand(NUM_LAYERS, case.num_experts, generator=torch.Generator().manual_seed(7))
    return LayerRows(limits, row(gain), row(reference), table if saliency else None, row(cap))


def make_step(case: SlotCase, *, bounds: bool = False) -> StepTensors:
    """Return a step with the case's padding, cleared sums and, if asked, floors and ceilings."""
    generator = torch.Generator().manual_seed(11)
    drawn = torch.randint(0, case.top_k + 1, (2, case.tokens), generator=generator).int()
    return StepTensors(
        torch.tensor([case.tokens - case.padding], dtype=torch.int32),
        drawn[0] if bounds else None,
        drawn[1] if bounds else None,
        make_step_sums(NUM_LAYERS, case.num_experts, "cpu"),
    )


Rule = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def assert_same(
    kernel: Rule,
    twin: Rule,
    case: SlotCase,
    device: str,
    rows: LayerRows,
    *extra: object,
    bounds: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run both on the case: ids, counts and lit experts are equal, weights are within rounding.

    Both take (weights, ids, rows, layer, *extra, num_shared, step). Returns the kernel's result.
    """
    weights, ids = make_slots(case)
    theirs, ours = make_step(case, bounds=bounds), on(device, make_step(case, bounds=bounds))
    expected_weights, expected_ids = twin(
        *(weights, ids, rows, LAYER, *extra), num_shared=case.num_shared, step=theirs
    )
    results = kernel(
        *(weights.to(device), ids.to(device), on(device, rows), LAYER, *extra),
        num_shared=case.num_shared,
        step=ours,
    )
    found_weights, found_ids = (tensor.cpu() for tensor in results)
    assert torch.equal(found_ids, expected_ids)
    assert found_ids.dtype == case.ids_dtype
    torch.testing.assert_close(found_weights, expected_weights, equal_nan=True)
    assert_same_sums(ours, theirs)
    return found_weights, found_ids


def assert_same_sums(ours: StepTensors, theirs: StepTensors) -> None:
    """Compare what two runs counted: slots and experts exactly, masses within rounding."""
    assert theirs.sums is not None
    assert ours.sums is not None
    torch.testing.assert_close(ours.sums.sums.cpu(), theirs.sums.sums, equal_nan=True)
    assert torch.equal(ours.sums.sums[:, :2].cpu(), theirs.sums.sums[:, :2])
    assert torch.equal(ours.sums.lit.cpu(), theirs.sums.lit)


Tensors = TypeVar("Tensors")


def on(device: str, tensors: Tensors) -> Tensors:
    """Return a copy of a tuple of tensors, tuples and None on a device."""

    def moved(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            return part.to(device, copy=True)
        if not isinstance(part, tuple):
            return part
        parts = tuple(moved(inner) for inner in part)
        return type(part)(*parts) if hasattr(part, "_fields") else parts

    copy: Tensors = moved(tensors)
    return copy
