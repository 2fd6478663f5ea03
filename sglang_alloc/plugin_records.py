"""Offline story, inside the engine: what the profiler wants recorded of the real layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from sglang_alloc.allocation_mode import Probe
from sglang_alloc.enforcement_probe import NO_RECORDERS, ProbeRecorders
from sglang_alloc.gain_record import GainRecorder
from sglang_alloc.lexi_record import record_deviations
from sglang_alloc.plugin_facts import expert_layers, moe_routers
from sglang_alloc.saliency_record import SaliencyRecorder

if TYPE_CHECKING:
    from pathlib import Path

    from sglang_alloc.worker import ServedModel, Worker


def probe_recorders(
    probe: Probe | None, model_runner: Any, model: ServedModel, record: Path | None
) -> ProbeRecorders:
    """Observe the experts' outputs where a table of probes asks for it."""
    records = probe.records if probe else None
    layers = expert_layers(model_runner.model)
    if records == "saliency":
        shape = len(model.layer_ids), model.num_experts
        saliency = SaliencyRecorder(shape, _completion(layers), record)
        saliency.attach(layers)
        return ProbeRecorders(saliency=saliency)
    if records == "gains":
        gains = GainRecorder(len(layers), _completion(layers), record)
        gains.attach(layers)
        return ProbeRecorders(gains=gains)
    return NO_RECORDERS


def record_lexi(model_runner: Any, worker: Worker, record: Path | None) -> None:
    """Record how far each layer's output moves at top-k, for the profiler."""
    modules = dict(model_runner.model.named_modules())
    routers = moe_routers(model_runner.model).values()
    names = {id(module): name for name, module in modules.items()}
    blocks = [modules[names[id(router)].rpartition(".")[0]] for router in routers]
    shape = worker.table.shape
    complete = _completion(expert_layers(model_runner.model))

    def dropping(is_dropping: bool) -> None:
        budget = shape.budget_min if is_dropping else shape.budget_max
        worker.enforcement.set_budgets(budget, budget)

    record_deviations(blocks, worker.model.top_k, complete, dropping, record)


def _completion(layers: list[Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what makes an expert layer's output whole: each rank holds a part of the sum."""
    from sglang.srt.distributed.communication_op import tensor_model_parallel_all_reduce

    def completed(output: torch.Tensor) -> torch.Tensor:
        summed: torch.Tensor = tensor_model_parallel_all_reduce(output)
        return summed

    is_whole = any(getattr(layer, "reduce_results", False) for layer in layers)
    return (lambda output: output) if is_whole else completed
