"""Data story: every hook on SGLang in this one file, but for those of fused routing.

Those are in `plugin_routing.py`. `plugin_facts.py` reads SGLang's objects, `plugin_proof.py` proves
that the hooks are reached, and `plugin_records.py` serves the profiler. No other file imports
SGLang.

A plugin that is configured but not in place would serve without its budget. So a problem found
before the hooks ends the process (`plugin_entry`), one found in a hook fails the load of the model,
and a scheduler that got past both without a bound table refuses its first iteration.
"""

from __future__ import annotations

import logging
import pkgutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sglang_alloc import plugin_routing
from sglang_alloc.allocation_mode import Probe, probe_of_note
from sglang_alloc.budget_follower import BudgetChange
from sglang_alloc.compatibility import installed_version, unsupported_version, verify_seams
from sglang_alloc.compatibility_seams import (
    CPU_EXPERTS,
    DECODE_GRAPHS,
    FORWARD,
    INITIALIZE,
    LOAD_MODEL,
    NEW_BATCH,
    NEW_REQUEST,
    PREFILL_GRAPHS,
    PULL_REQUESTS,
    RECEIVE_REQUESTS,
    ROUTED_SLOTS,
    RUN_BATCH,
    TRITON_EXPERTS,
    VERIFY_PARAMETERS,
)
from sglang_alloc.cpu_moe import forward_experts
from sglang_alloc.enforcement import RoutedSlots
from sglang_alloc.errors import AllocError, UnsupportedServerError
from sglang_alloc.model_identity import identity_from_config
from sglang_alloc.plugin_facts import (
    expert_layers,
    largest_forward,
    moe_routers,
    num_shared_columns,
    resolved_options,
    served_model,
    server_facts,
)
from sglang_alloc.plugin_proof import (
    computes_as_the_engine,
    is_hooked,
    prove_routing,
    unrecorded,
)
from sglang_alloc.plugin_queue import tell_worker
from sglang_alloc.plugin_records import probe_recorders, record_lexi
from sglang_alloc.plugin_requests import RequestBudgets
from sglang_alloc.priority_floors import require_order
from sglang_alloc.request_budget import RequestRules, asked_budget
from sglang_alloc.server_check import check_server
from sglang_alloc.serving_rules import facts_of, mode_to_serve
from sglang_alloc.shared_table import SharedTable
from sglang_alloc.triton_experts import skip_dropped
from sglang_alloc.worker import Worker, check_fits, make_enforcement
from sglang_alloc.worker_settings import WorkerSettings, settings_from_environment

if TYPE_CHECKING:
    import torch

    from sglang_alloc.allocation_mode import Phase
    from sglang_alloc.worker_metrics import WorkerMetrics

logger = logging.getLogger("sglang_alloc")


@dataclass
class _Process:
    """What this SGLang process knows: nothing while inert, a worker once a model is bound."""

    settings: WorkerSettings | None = None
    # What requests may ask for, known in the process that answers them too.
    request_rules: RequestRules | None = None
    worker: Worker | None = None
    request_budgets: RequestBudgets | None = None
    # By id of a layer's TopKConfig: one object, made with the model and living as long.
    layer_index_of: dict[int, int] = field(default_factory=dict)
    # By id: the expert layers that `forward_gated_experts` was seen to compute as the engine does.
    gated_layers: set[int] = field(default_factory=set)


_process = _Process()


def register_hooks() -> None:
    """Put the hooks in place; raises what keeps the budget from being enforced.

    Called by `plugin_entry.register`, and only when a table is configured.
    """
    _process.settings = settings_from_environment()
    assert _process.settings is not None
    _process.request_rules = _check_before_hooks(_process.settings)
    from sglang.srt.plugins.hook_registry import HookRegistry

    for target, hook, kind in _hooks():
        HookRegistry.register(target, hook, kind)


def _check_before_hooks(settings: WorkerSettings) -> RequestRules:
    """Refuse another SGLang, a missing seam or a broken table before anything is patched.

    Returns what requests may ask for under this table.
    """
    problems = unsupported_version(installed_version())
    problems = problems or verify_seams(pkgutil.resolve_name)
    if problems:
        raise UnsupportedServerError("; ".join(problems))
    with SharedTable.open(settings.table_path) as table:
        mode_to_serve(settings, facts_of(table))
        budgets = table.shape.budget_min, table.shape.budget_max
        return RequestRules(settings.request_budgets, *budgets, settings.priority_floors)


def _hooks() -> list[tuple[str, Callable[..., Any], Any]]:
    from sglang.srt.plugins.hook_registry import HookType

    assert _process.settings is not None
    fused = plugin_routing.fused_hooks() if _process.settings.routing == "fused" else []
    return [
        *fused,
        (LOAD_MODEL, _around_load_model, HookType.AROUND),
        (INITIALIZE, _after_initialize, HookType.AFTER),
        (PULL_REQUESTS, _after_pull_requests, HookType.AFTER),
        (RECEIVE_REQUESTS, _after_receive_requests, HookType.AFTER),
        (VERIFY_PARAMETERS, _after_verify_parameters, HookType.AFTER),
        (NEW_REQUEST, _after_new_request, HookType.AFTER),
        (NEW_BATCH, _after_new_batch, HookType.AFTER),
        (RUN_BATCH, _before_run_batch, HookType.BEFORE),
        (FORWARD, _before_forward, HookType.BEFORE),
        (ROUTED_SLOTS, _before_routed_slots, HookType.BEFORE),
        (DECODE_GRAPHS, _before_decode_graphs, HookType.BEFORE),
        (PREFILL_GRAPHS, _before_prefill_graphs, HookType.BEFORE),
        (CPU_EXPERTS, _around_cpu_experts, HookType.AROUND),
        (TRITON_EXPERTS, _before_triton_experts, HookType.BEFORE),
    ]


def _around_load_model(
    original: Callable[..., Any], model_runner: Any, *args: Any, **kwargs: Any
) -> Any:
    """Bind the table to the loaded model, before memory is sized and graphs are captured.

    The model's identity is read before the load, which pads sizes in the config on some CPUs.
    """
    if model_runner.is_draft_worker:
        return original(model_runner, *args, **kwargs)
    _or_refuse(lambda: _order_priorities(model_runner.server_args))
    config = model_runner.model_config.hf_config.to_dict()
    result = original(model_runner, *args, **kwargs)
    _or_refuse(lambda: _bind(model_runner, config))
    return result


def _after_initialize(result: object, model_runner: Any, *args: Any, **kwargs: Any) -> None:
    """Prove on a real layer that routing obeys the budget, and say so in one line."""
    if not model_runner.is_draft_worker:
        with unrecorded():  # made-up tokens belong to no forward that could be recorded
            _or_refuse(lambda: _prove(model_runner))


def _or_refuse(step: Callable[[], None]) -> None:
    """Run a step of the start-up; what it refuses fails the load, which stops the server."""
    try:
        step()
    except AllocError as error:
        message = _refusal(error)
        logger.error(message)
        raise RuntimeError(message) from error


def _bind(model_runner: Any, config: dict[str, Any]) -> None:
    assert _process.settings is not None
    missing = [target for target, hook, _ in _hooks() if not is_hooked(target, hook)]
    if missing:
        raise UnsupportedServerError(f"these hooks did not take effect: {', '.join(missing)}")
    routers = moe_routers(model_runner.model)
    check_server(server_facts(model_runner, routers))
    model = served_model(model_runner, routers, identity_from_config(config))
    worker = Worker(_process.settings)
    check_fits(worker.table, model)
    record = _process.settings.profile_folder if model.rank == 0 else None
    recorders = probe_recorders(probe_of_note(worker.table.mode_note), model_runner, model, record)
    enforcement = make_enforcement(worker.table, worker.mode, model.device_type, record, recorders)
    worker.bind(model, enforcement, _metrics(model_runner.server_args, model.rank))
    _process.layer_index_of = {
        id(router.topk_config): index for index, router in enumerate(routers.values())
    }
    if _process.settings.routing == "fused":
        plugin_routing.start(worker, _process.layer_index_of)
    assert _process.request_rules is not None
    _process.request_budgets = RequestBudgets(_process.request_rules, worker.count_ignored_budget)
    _process.worker = worker


def _order_priorities(server_args: Any) -> None:
    """Take the engine's order of priorities, or refuse floors that go against it."""
    rules = _process.request_rules
    assert rules is not None
    smaller = bool(resolved_options(server_args).get("schedule_low_priority_values_first"))
    require_order(rules.priority_floors, smaller_is_urgent=smaller)
    _process.request_rules = rules._replace(smaller_is_urgent=smaller)


def _prove(model_runner: Any) -> None:
    assert _process.worker is not None
    assert _process.settings is not None
    model = _process.worker.model
    routers = moe_routers(model_runner.model)
    for layer_index, router in enumerate(routers.values()):
        slots = prove_routing(_process.worker, layer_index, router)
    plugin_routing.prove(routers)
    _process.worker.prepare(slots, largest_forward(model_runner.server_args))
    if model.device_type == "cpu":
        _process.gated_layers = {
            id(layer)
            for layer in expert_layers(model_runner.model)
            if computes_as_the_engine(layer, model.top_k)
        }
    if probe_of_note(_process.worker.table.mode_note) == Probe("layer", "lexi"):
        record = _process.settings.profile_folder if model.rank == 0 else None
        record_lexi(model_runner, _process.worker, record)
    _process.worker.watch_layers()
    logger.info(
        "sglang-alloc is in force: model %s, %d MoE layers, %d experts, top-%d, table %s, mode %s, "
        "rank %d, %d hooks verified",
        *(model.name, len(model.layer_ids), model.num_experts, model.top_k),
        *(_process.settings.table_path, _process.worker.mode, model.rank, len(_hooks())),
    )


def _metrics(server_args: Any, rank: int) -> WorkerMetrics | None:
    if not server_args.enable_metrics:
        return None
    if rank != 0 and not getattr(server_args, "enable_metrics_for_all_schedulers", False):
        return None
    from sglang_alloc.worker_metrics import WorkerMetrics

    return WorkerMetrics(rank)


def _worker_in_force() -> Worker | None:
    """Return the worker; None while the plugin is inert.

    Raises RuntimeError, which stops the server before its first request, when a table is configured
    and no model was bound to it: then the hook on the load of the model did not take effect.
    """
    if _process.worker is None and _process.settings is not None:
        raise RuntimeError(
            "sglang-alloc refuses to serve: a scheduler runs and no model was bound to "
            f"{_process.settings.table_path}: the hook on {LOAD_MODEL} did not take effect"
        )
    return _process.worker


def _after_pull_requests(requests: list[Any] | None, *args: Any, **kwargs: Any) -> None:
    """On the leading rank (the one that holds a list), let a change join the broadcast."""
    worker = _worker_in_force()
    if worker is None or requests is None:
        return
    change = worker.poll(time.monotonic_ns())
    if change is not None:
        requests.append(change)


def _after_receive_requests(requests: list[Any], *args: Any, **kwargs: Any) -> list[Any] | None:
    """On every rank, take the changes out of the broadcast and put the last one in force."""
    if _process.worker is None or not requests:
        return None
    changes = [request for request in requests if isinstance(request, BudgetChange)]
    if not changes:
        return None
    _process.worker.apply(changes[-1])
    return [request for request in requests if not isinstance(request, BudgetChange)]


def _after_verify_parameters(result: object, parameters: Any, *args: Any, **kwargs: Any) -> None:
    """Refuse a request for a budget that it cannot have, where SGLang answers with HTTP 400."""
    if _process.request_rules is not None:
        asked_budget(parameters.custom_params, _process.request_rules)


def _after_new_request(result: object, request: Any, *args: Any, **kwargs: Any) -> None:
    """On every rank, note a request's own budget."""
    if _process.request_budgets is not None:
        _process.request_budgets.admit(request)


def _after_new_batch(
    forward_batch: Any, batch_class: type, batch: Any, *args: Any, **kwargs: Any
) -> None:
    """On every rank, let a forward's batch carry the own budgets of its requests."""
    if _process.request_budgets is not None:
        _process.request_budgets.attach(forward_batch, batch.reqs)


def _before_run_batch(scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """On every rank, tell the worker how many requests wait and run beside the batch to come.

    Each rank decides by itself whether the step is calm: tensor-parallel ranks form the same
    batches from the same queue, and ranks of other kinds are refused (`server_check.py`).
    """
    if _process.worker is not None:
        tell_worker(_process.worker, scheduler, batch)


def _before_forward(model_runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> None:
    """On every rank, tell the worker which phase begins; a draft model's forwards are its own."""
    if model_runner.is_draft_worker:
        return
    worker = _worker_in_force()
    phase = _phase(forward_batch.forward_mode)
    if worker is not None and phase is not None:
        requests = _process.request_budgets
        own = None if requests is None else requests.of_forward(forward_batch)
        worker.begin_forward(phase, len(forward_batch.input_ids), own)


def _phase(forward_mode: Any) -> Phase | None:
    """Decode for decodes and verifies, prefill for extends and for mixed batches, None for idle."""
    if forward_mode.is_decode() or forward_mode.is_target_verify():
        return "decode"
    return "prefill" if forward_mode.is_extend() else None


def _before_routed_slots(*args: Any, **kwargs: Any) -> tuple[Any, Any] | None:
    """Drop the slots beyond the budget from the routing of one layer.

    Here, between SGLang's choice of experts and its recorders of what was chosen, these see what is
    really activated.
    """
    if plugin_routing.has_routed(kwargs.get("topk_ids")):
        return None  # by our kernel, which has dropped them
    topk_config: Any = kwargs.get("topk_config")
    layer_index = _process.layer_index_of.get(id(topk_config))
    if _process.worker is None or layer_index is None:
        return None  # inert, or a draft model's layer
    weights, ids = kwargs["topk_weights"], kwargs["topk_ids"]
    # Where SGLang appends the shared experts' columns later, they are not there yet.
    complete = ids.shape[1] == topk_config.top_k
    slots = RoutedSlots(weights, ids, num_shared_columns(topk_config) if complete else 0)
    kept = _process.worker.route(layer_index, slots)
    if kept is slots:
        return None
    return args, {**kwargs, "topk_weights": kept.weights, "topk_ids": kept.ids}


def _before_decode_graphs(*args: Any, **kwargs: Any) -> None:
    """Tell the worker that the graphs to come are captured for decode steps."""
    if _process.worker is not None:
        _process.worker.begin_capture("decode")


def _before_prefill_graphs(*args: Any, **kwargs: Any) -> None:
    """Tell the worker that the graphs to come are captured for prefill."""
    if _process.worker is not None:
        _process.worker.begin_capture("prefill")


def _around_cpu_experts(
    original: Callable[..., torch.Tensor],
    layer: Any,
    x: torch.Tensor,
    topk_output: Any,
    moe_runner_config: Any,
) -> torch.Tensor:
    """Run the kept slots only; a full budget goes straight through to the engine's function."""
    if _process.worker is None or not _process.worker.enforcement.drops_slots():
        return original(layer, x, topk_output, moe_runner_config)
    is_gated = id(layer) in _process.gated_layers
    return forward_experts(original, layer, x, topk_output, moe_runner_config, is_gated=is_gated)


def _before_triton_experts(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Let the Triton kernels skip the dropped slots."""
    return (
        (args, kwargs)
        if _process.worker is None
        else skip_dropped(args, kwargs, installed_version())
    )


def _refusal(error: AllocError) -> str:
    return f"sglang-alloc refuses to serve: {error}"
