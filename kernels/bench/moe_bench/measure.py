"""Bench, the measurements: routing alone, and a MoE layer with routing, drop and experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from moe_bench.budgets import MODES, Budget, Rule, Slots, budgets_of, make_rule
from moe_bench.engine import Experts, gated_experts, stock_routing, triton_experts
from moe_bench.roofline import Ceilings, Work, bytes_moved, least_seconds, operations
from moe_bench.shapes import LayerInputs, MoEShape, make_experts, make_inputs
from moe_bench.timing import Timer, Timing
from sglang_alloc_kernels.layer_rows import LayerRows, StepTensors
from sglang_alloc_kernels.slot_rules import KERNELS, TWINS, SlotRules
from sglang_alloc_kernels.step_statistics import make_step_sums, make_totals
from sglang_alloc_kernels.union_routing import union_routing, union_routing_torch

HALF = Budget(0.5)
# What a layer's row is of, behind stock.
DROPPED, FUSED = "stock routing, drop, experts", "fused routing, experts"
# `union_routing`, which no server calls.
CHOSEN_ANEW = "fused, chosen anew in the set, not served"


class Row(NamedTuple):
    """One line of the results; times in microseconds, None where a column says nothing.

    `stock_us` is stock SGLang in the same unit, `speedup` stock over this. `roofline_speedup` is
    what bytes and operations allow for the distinct experts and activations that were measured.
    """

    kind: str
    shape: str
    num_tokens: int
    mode: str
    budget: str
    variant: str
    median_us: float
    low_us: float
    high_us: float
    stock_us: float | None = None
    speedup: float | None = None
    activations_per_token: float | None = None
    distinct_experts: float | None = None
    megabytes: float | None = None
    gigaflops: float | None = None
    roofline_us: float | None = None
    roofline_speedup: float | None = None
    share_of_roofline: float | None = None


class Bench(NamedTuple):
    """What all measurements share."""

    device: torch.device
    timer: Timer
    ceilings: Ceilings

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def rules(self) -> SlotRules:
        return KERNELS if self.device.type == "cuda" else TWINS


def measure_routing(bench: Bench, shape: MoEShape, num_tokens: int) -> Iterator[Row]:
    """Time routing alone: stock, stock and then each mode's drop, statistics, and fused."""
    inputs = make_inputs(shape, num_tokens, bench.device, bench.dtype)
    route = stock_routing(shape, inputs)
    stock = bench.timer.seconds(route)

    def row(mode: str, budget: str, variant: str, timing: Timing) -> Row:
        names = ("routing", shape.name, num_tokens, mode, budget, variant)
        ratio = stock.median / timing.median
        return Row(*names, *_microseconds(timing), stock_us=1e6 * stock.median, speedup=ratio)

    yield row("-", "full", "stock", stock)
    slots = _copied(route())
    for mode in MODES:
        rule = make_rule(shape, mode, HALF, slots, bench.rules)
        for variant, step in (
            ("stock, drop", step_as_served(shape, num_tokens, bench.device, counted=False)),
            ("stock, drop, sums", step_as_served(shape, num_tokens, bench.device, counted=True)),
        ):
            timing = bench.timer.seconds(lambda: rule.drop(*route(), step))  # noqa: B023
            yield row(mode, "1/2", variant, timing)
    for mode, variant, call in _fused_calls(bench, shape, inputs, slots):
        yield row(mode, "1/2", variant, bench.timer.seconds(call))
    sums = make_step_sums(shape.num_layers, shape.num_experts, bench.device)
    totals = make_totals(shape.num_layers, bench.device)
    step_end = bench.timer.seconds(lambda: bench.rules.statistics(sums, totals))
    yield row("-", "-", "statistics of a step, once for all layers", step_end)


def _fused_calls(
    bench: Bench, shape: MoEShape, inputs: LayerInputs, slots: Slots
) -> Iterator[tuple[str, str, Callable[[], Slots]]]:
    """Yield mode, variant and routing from logits on: as served, and a variant of `union`."""
    for counted, variant in ((False, "fused"), (True, "fused, sums")):
        step = step_as_served(shape, len(inputs.router_logits), bench.device, counted=counted)
        for mode in MODES:
            rule = make_rule(shape, mode, HALF, slots, bench.rules)
            yield mode, variant, _fused_routing(bench, shape, inputs, mode, rule, step)
    rows = make_rule(shape, "union", HALF, slots, bench.rules).rows  # a variant beside
    over_set = union_routing if bench.device.type == "cuda" else union_routing_torch
    step = step_as_served(shape, len(inputs.router_logits), bench.device, counted=False)
    yield (
        *("union", CHOSEN_ANEW),
        lambda: over_set(
            *(inputs.router_logits, shape.router, rows, 0),
            correction_bias=inputs.correction_bias,
            step=step,
        ),
    )


def _fused_routing(
    bench: Bench, shape: MoEShape, inputs: LayerInputs, mode: str, rule: Rule, step: StepTensors
) -> Callable[[], Slots]:
    """Return routing and drop as `DeviceEnforcement.route` does them, as a call without arguments.

    One launch, or where all tokens' slots are needed first, the drop's own behind it.
    """
    route = partial(
        bench.rules.routing,
        *(inputs.router_logits, shape.router),
        correction_bias=inputs.correction_bias,
    )
    if mode in {"token", "union"}:
        plain, alone = LayerRows(rule.rows.limits), StepTensors(step.num_valid_tokens)
        return lambda: rule.drop(*route(plain, 0, "all", step=alone), step)
    return lambda: route(rule.rows, 0, rule.kind, step=step)


def measure_layer(
    bench: Bench,
    shape: MoEShape,
    num_tokens: int,
    kind: str = "layer",
    modes: tuple[str, ...] = MODES,
    experts: Experts | None = None,
) -> Iterator[Row]:
    """Time a layer, routing and experts, in every mode at every budget, beside stock SGLang.

    Each also routed by our kernel. Stock is timed first and last, and its better time counts.
    Counts are those of one call.
    """
    inputs = make_inputs(shape, num_tokens, bench.device, bench.dtype)
    if experts is None:
        make = triton_experts if bench.device.type == "cuda" else gated_experts
        experts = make(make_experts(shape, bench.device, bench.dtype))
    route = stock_routing(shape, inputs)
    slots = _copied(route())
    hidden_states = inputs.hidden_states.clone()
    step = step_as_served(shape, num_tokens, bench.device, counted=True)
    timed: list[tuple[tuple[str, str, str], Timing, Work]] = []

    def stock_call() -> torch.Tensor:
        return experts(hidden_states, *route(), False)

    stock = bench.timer.seconds(stock_call)
    for mode in modes:
        for budget, share in budgets_of(mode).items():
            rule = make_rule(shape, mode, share, slots, bench.rules)
            work = _work(rule.drop(*slots, step)[1])

            routings: dict[str, Callable[[], Slots]] = {
                DROPPED: partial(dropped, rule, route, step),
                FUSED: _fused_routing(bench, shape, inputs, mode, rule, step),
            }
            for variant, routing in routings.items():
                timing = bench.timer.seconds(partial(_layer, experts, hidden_states, routing))
                timed.append(((mode, budget, variant), timing, work))
    stock = min(stock, bench.timer.seconds(stock_call))
    full = _work(slots[1])
    yield _layer_row(bench, shape, kind, ("-", "full", "stock"), stock, full, stock, full)
    for names, timing, work in timed:
        yield _layer_row(bench, shape, kind, names, timing, work, stock, full)


def dropped(rule: Rule, route: Callable[[], Slots], step: StepTensors) -> Slots:
    """Route by SGLang and drop behind it."""
    return rule.drop(*route(), step)


def _layer(
    experts: Experts, hidden_states: torch.Tensor, routing: Callable[[], Slots]
) -> torch.Tensor:
    return experts(hidden_states, *routing(), True)


def _layer_row(
    bench: Bench,
    shape: MoEShape,
    kind: str,
    names: tuple[str, str, str],
    timing: Timing,
    work: Work,
    stock: Timing,
    full: Work,
) -> Row:
    least = least_seconds(shape, work, bench.ceilings)
    allowed = least_seconds(shape, full, bench.ceilings) / least
    speedup = stock.median / timing.median
    return Row(
        *(kind, shape.name, work.num_tokens, *names),
        *_microseconds(timing),
        stock_us=1e6 * stock.median,
        speedup=speedup,
        activations_per_token=work.activations / max(1, work.num_tokens),
        distinct_experts=work.distinct_experts,
        megabytes=bytes_moved(shape, work) / 1e6,
        gigaflops=operations(shape, work) / 1e9,
        roofline_us=1e6 * least,
        roofline_speedup=allowed,
        share_of_roofline=speedup / allowed,
    )


def _work(ids: torch.Tensor) -> Work:
    kept = ids[ids >= 0]
    return Work(len(ids), int(kept.numel()), len(set(kept.tolist())))


def step_as_served(
    shape: MoEShape, num_tokens: int, device: torch.device, *, counted: bool
) -> StepTensors:
    """Return a step's tensors as in service: no padding rows, and bounds that let all slots by."""
    valid = torch.tensor([num_tokens], dtype=torch.int32, device=device)
    floors = torch.zeros(num_tokens, dtype=torch.int32, device=device)
    sums = make_step_sums(1, shape.num_experts, device) if counted else None
    return StepTensors(valid, floors, torch.full_like(floors, shape.top_k), sums)


def _copied(slots: Slots) -> Slots:
    weights, ids = slots
    return weights.clone(), ids.clone()


def _microseconds(timing: Timing) -> tuple[float, float, float]:
    return 1e6 * timing.median, 1e6 * timing.low, 1e6 * timing.high
