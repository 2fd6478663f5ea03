"""Data story, step 8 on a GPU, if asked for: one kernel chooses a layer's experts and drops slots.

SGLang's routing of many models is several kernels; ours is one, and the drop is part of it. The
hooks are on SGLang's functions from logits to slots. What our kernel does not reproduce, and a
layer whose slots differ from SGLang's on made-up tokens, stays with SGLang's functions.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sglang_alloc.allocation_mode import PHASES
from sglang_alloc.compatibility_seams import FUSED_TOPK, GROUPED_TOPK, SELECT_EXPERTS
from sglang_alloc.errors import UnsupportedServerError
from sglang_alloc.worker_settings import ROUTING_VARIABLE
from sglang_alloc_kernels.budgeted_routing import Router

if TYPE_CHECKING:
    from sglang_alloc.worker import Worker

logger = logging.getLogger("sglang_alloc")

Slots = tuple[torch.Tensor, torch.Tensor]  # weights (T, K) and ids (T, K)

# What the functions are told and our kernel knows; anything else must be empty.
_KNOWN = {
    *("hidden_states", "gating_output", "topk", "renormalize", "scoring_func"),
    *("num_expert_group", "topk_group"),
    *("routed_scaling_factor", "apply_routed_scaling_factor_on_output"),
}
_PROOF_TOKENS = 16
# With one of these set SGLang overwrites what was chosen, from 0.5.23 on in our own tensors.
_SIMULATIONS = ("SGLANG_SIMULATE_UNIFORM_EXPERTS", "SGLANG_SIMULATE_ROUND_ROBIN_EXPERTS")
_YES = {"1", "true", "yes", "y"}  # as SGLang reads them


def router_of(arguments: Mapping[str, Any]) -> Router | None:
    """Return how SGLang's function would route, told by its arguments; None where ours would not.

    `grouped_topk` is told `num_expert_group`, `fused_topk` is not.
    """
    unknown = (value for name, value in arguments.items() if name not in _KNOWN)
    if any(isinstance(value, torch.Tensor) or value for value in unknown):
        return None  # columns of shared experts, a correction bias, packed slots
    scoring, groups = arguments.get("scoring_func", "softmax"), arguments.get("num_expert_group")
    scaling = arguments.get("routed_scaling_factor") or 1.0
    if not arguments.get("apply_routed_scaling_factor_on_output"):
        scaling = 1.0
    renormalize = bool(arguments["renormalize"])
    if groups is None:
        supported = scoring == "softmax" and scaling == 1.0
    else:
        # Its scores have the type of the logits. Before 0.5.23 it scales only what it renormalised.
        supported = scoring in {"softmax", "sigmoid"} and (renormalize or scaling == 1.0)
        supported = supported and arguments["gating_output"].dtype == torch.float32
    if not supported:
        return None
    top_groups = 1 if groups is None else int(arguments["topk_group"])
    return Router(
        *(int(arguments["topk"]), scoring, renormalize, int(groups or 1), top_groups),
        float(scaling),
    )


class FusedRouting:
    """Which layer routes now, and which slots are ours.

    layer_index_of: by id of a layer's TopKConfig.
    """

    def __init__(self, worker: Worker, layer_index_of: Mapping[int, int]) -> None:
        self._worker = worker
        self._layer_index_of = layer_index_of
        self._layers = set(layer_index_of.values())  # that our kernel may route
        self._warns = False  # of a layer that was proved to be ours and is not in service
        self._config: Any = None
        self._ids: torch.Tensor | None = None
        self._was_ours = False

    def begin(self, topk_config: Any) -> None:
        """Note whose slots are chosen next: the layer of this configuration."""
        self._config, self._ids = topk_config, None

    def route(self, arguments: Mapping[str, Any]) -> Slots | None:
        """Return the slots of the layer under way, the budget applied; None to let SGLang route."""
        layer_index = self._layer_index_of.get(id(self._config))
        if layer_index is None or layer_index not in self._layers:
            return None
        router = None if _scales_later(self._config, arguments) else router_of(arguments)
        if router is None:
            self._warn_once(layer_index, arguments["gating_output"].dtype)
            return None
        slots = self._worker.route_logits(layer_index, arguments["gating_output"], router)
        self._ids = slots.ids
        return slots.weights, slots.ids

    def end(self, ids: torch.Tensor | None) -> bool:
        """Return whether these ids are what `route` returned for the layer under way."""
        self._was_ours = self._ids is not None and ids is self._ids
        self._config, self._ids = None, None
        return self._was_ours

    def prove(self, routers: Mapping[int, Any]) -> None:
        """Keep the layers whose slots are SGLang's own on made-up tokens at full budget.

        routers: SGLang's, by layer id, in order. Ranks must have kept the same. Each phase's kernel
        is compiled by the way. Raises UnsupportedServerError where no layer is left.
        """
        proved = {
            index for index, router in enumerate(routers.values()) if self._agrees(index, router)
        }
        self._layers = proved
        if not proved:
            raise UnsupportedServerError(
                f"{ROUTING_VARIABLE}=fused was asked for, and our kernel reproduces the routing of "
                "no layer of this model (it knows softmax and sigmoid, with and without groups, "
                "but no correction bias and no columns of shared experts): leave it out"
            )
        self._worker.agree_on(",".join(str(index) for index in sorted(proved)))
        self._warns = True
        logger.info(
            "sglang-alloc routes %d of %d MoE layers by one kernel", len(proved), len(routers)
        )

    def _agrees(self, layer_index: int, router: Any) -> bool:
        """Return whether our kernel routes the layer, and as SGLang does in both phases."""
        model = self._worker.model
        is_ours = False
        for phase in PHASES:
            self._worker.enforcement.begin_forward(phase)
            for logits in _proof_logits(layer_index, model.num_experts):
                if logits.dtype != torch.float32 and _is_grouped(router):
                    continue  # `router_of` leaves these to SGLang: it would compile them for this
                theirs, ours = self._both_ways(layer_index, router, logits.to(model.device_type))
                is_ours = is_ours or self._was_ours
                if self._was_ours and not _same_slots(theirs, ours):
                    logger.warning(
                        "sglang-alloc leaves the routing of MoE layer %d to SGLang: its own "
                        "differs for %s logits",
                        *(model.layer_ids[layer_index], logits.dtype),
                    )
                    return False
        return is_ours

    def _both_ways(self, layer_index: int, router: Any, logits: torch.Tensor) -> tuple[Any, Any]:
        """Return what the layer routes by SGLang's functions, and then by our kernel if it can."""
        hidden_states = logits.new_zeros(_PROOF_TOKENS, 8)
        self._layers = set()
        theirs = router(hidden_states, logits)
        self._layers = {layer_index}
        return theirs, router(hidden_states, logits)

    def _warn_once(self, layer_index: int, dtype: torch.dtype) -> None:
        """Say that SGLang routes a layer that the log counts among ours."""
        if self._warns:
            self._warns = False
            logger.warning(
                "SGLang goes on to route MoE layer %d itself, and others like it: in service its "
                "routing is called (with %s logits) as our kernel does not reproduce it",
                *(self._worker.model.layer_ids[layer_index], dtype),
            )


@dataclass
class _Process:
    """What this SGLang process knows: nothing unless the routing is ours."""

    routing: FusedRouting | None = None


_process = _Process()


def start(worker: Worker, layer_index_of: Mapping[int, int]) -> None:
    """Let our kernel route the layers from now on, as far as it can.

    Raises UnsupportedServerError on a CPU, where nothing runs it, and where SGLang simulates a
    routing instead.
    """
    if worker.model.device_type == "cpu":
        raise UnsupportedServerError(
            f"{ROUTING_VARIABLE}=fused asks for a kernel that needs a GPU: leave it out"
        )
    simulations = [name for name in _SIMULATIONS if os.environ.get(name, "").lower() in _YES]
    if simulations:
        raise UnsupportedServerError(
            f"{ROUTING_VARIABLE}=fused drops slots while it chooses them, and "
            f"{simulations[0]} overwrites what was chosen: leave one of them out"
        )
    _process.routing = FusedRouting(worker, layer_index_of)


def prove(routers: Mapping[int, Any]) -> None:
    """As `FusedRouting.prove`; nothing where it was not started."""
    if _process.routing is not None:
        _process.routing.prove(routers)


def has_routed(ids: torch.Tensor | None) -> bool:
    """Return whether a layer's ids are of our kernel, the budget applied; ends its routing."""
    return _process.routing is not None and _process.routing.end(ids)


def before_select_experts(*args: Any, **kwargs: Any) -> None:
    """Note which layer's experts are chosen next."""
    if _process.routing is not None:
        _process.routing.begin(kwargs["topk_config"] if "topk_config" in kwargs else args[2])


def around_gate(original: Callable[..., Slots], *args: Any, **kwargs: Any) -> Slots:
    """Route by our kernel where it can, else by SGLang's function."""
    routing = _process.routing
    slots = None if routing is None or args else routing.route(kwargs)
    return original(*args, **kwargs) if slots is None else slots


def fused_hooks() -> list[tuple[str, Callable[..., Any], Any]]:
    """Return targets, hooks and their types."""
    from sglang.srt.plugins.hook_registry import HookType

    return [
        (SELECT_EXPERTS, before_select_experts, HookType.BEFORE),
        (GROUPED_TOPK, around_gate, HookType.AROUND),
        (FUSED_TOPK, around_gate, HookType.AROUND),
    ]


def _scales_later(topk_config: Any, arguments: Mapping[str, Any]) -> bool:
    """Return whether SGLang scales the weights behind `fused_topk`, where thresholds expect it."""
    scaling = getattr(topk_config, "routed_scaling_factor", None)
    applies = bool(getattr(topk_config, "apply_routed_scaling_factor_on_output", False))
    return "num_expert_group" not in arguments and applies and scaling not in (None, 1.0)


def _is_grouped(router: Any) -> bool:
    """Return whether SGLang's `grouped_topk` routes a layer."""
    return bool(getattr(getattr(router, "topk_config", None), "use_grouped_topk", False))


def _proof_logits(seed: int, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return made-up logits (T, E) of the types that routers give, float32 and bfloat16.

    Those of bfloat16 tie, as a router's often do: the smaller id wins, in SGLang's kernels and
    in ours. Those of float32 do not, because `grouped_topk` leaves ties to torch.
    """
    made_up = torch.Generator().manual_seed(seed)
    logits = 2.0 * torch.randn(_PROOF_TOKENS, num_experts, generator=made_up)
    return logits, (logits * 4).round().div(4).bfloat16()


def _same_slots(theirs: Any, ours: Any) -> bool:
    """Compare slots in any order: the same experts, weights within rounding."""
    order, our_order = theirs.topk_ids.argsort(dim=1), ours.topk_ids.argsort(dim=1)
    if not torch.equal(theirs.topk_ids.gather(1, order), ours.topk_ids.gather(1, our_order)):
        return False
    weights, our_weights = theirs.topk_weights.float(), ours.topk_weights.float()
    return torch.allclose(
        weights.gather(1, order), our_weights.gather(1, our_order), rtol=1e-4, atol=1e-7
    )
