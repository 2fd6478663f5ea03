"""Routing by one kernel of ours, under SGLang's own `select_experts`."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from enforcement_cases import BUDGETS, EXPERTS, FULL, LAYERS, TOP_K, make_tables

from sglang_alloc import plugin, plugin_routing
from sglang_alloc.enforcement import EnforcementTables, RoutedSlots
from sglang_alloc.enforcement_device import DeviceEnforcement
from sglang_alloc.errors import UnsupportedServerError
from sglang_alloc_kernels.budgeted_routing import Router
from sglang_alloc_kernels.slot_rules import KERNELS

TOKENS = 9
# As DeepSeek-V2-Lite's layers, DeepSeek-V2's, and Qwen3's are configured.
CONFIGS: dict[str, dict[str, Any]] = {
    "one group": {
        "use_grouped_topk": True,
        "num_expert_group": 1,
        "topk_group": 1,
        "renormalize": False,
    },
    "groups": {
        "use_grouped_topk": True,
        "num_expert_group": 6,
        "topk_group": 3,
        "renormalize": True,
    },
    "no groups": {"renormalize": True},
}


class _Worker:
    """Worker, as far as routing needs it, on the device under test."""

    def __init__(self, tables: EnforcementTables, device: str) -> None:
        self.mode = tables.mode
        self.enforcement = DeviceEnforcement(tables, torch.device(device), KERNELS)
        self.model = SimpleNamespace(
            num_experts=EXPERTS, device_type=device, layer_ids=tuple(range(LAYERS))
        )
        self.dropped = 0  # calls of the drop behind SGLang's own routing
        self.agreed: list[str] = []

    def agree_on(self, fact: str) -> None:
        self.agreed.append(fact)

    def route(self, layer_index: int, slots: RoutedSlots) -> RoutedSlots:
        self.dropped += 1
        return self.enforcement.drop(layer_index, slots)

    def route_logits(
        self, layer_index: int, router_logits: torch.Tensor, router: Router
    ) -> RoutedSlots:
        return self.enforcement.route(layer_index, router_logits, router)


class _Server:
    """SGLang's module with the hooks in place, and one routing configuration per MoE layer."""

    def __init__(
        self, topk: Any, name: str, mode: str, device: str, patch: pytest.MonkeyPatch
    ) -> None:
        tables = make_tables(mode)
        plain = [
            rows._replace(gains=None, references=None) for rows in (tables.prefill, tables.decode)
        ]
        # Without saliency thresholds are of weights, which these configurations differ in.
        tables = tables._replace(prefill=plain[0], decode=plain[1], saliency=None)
        self.worker, self._topk, self._device = _Worker(tables, device), topk, device
        self.configs = [topk.TopKConfig(top_k=TOP_K, **CONFIGS[name]) for _ in range(LAYERS)]
        self.routers = {index: self._router(index) for index in range(LAYERS)}
        layer_index_of = {id(config): index for index, config in enumerate(self.configs)}
        self.routing = plugin_routing.FusedRouting(self.worker, layer_index_of)  # type: ignore[arg-type]
        self.gate_calls = 0
        self.gate_types: set[torch.dtype] = set()  # of the logits that SGLang routed
        process = plugin._Process(layer_index_of=layer_index_of)
        process.worker = self.worker  # type: ignore[assignment]
        patch.setattr(plugin, "_process", process)
        patch.setattr(plugin_routing._process, "routing", self.routing)
        patch.setattr(topk, "grouped_topk", self._gate(topk.grouped_topk_gpu))
        ungrouped = topk.fused_topk if device == "cuda" else topk.fused_topk_torch_native
        patch.setattr(topk, "fused_topk", self._gate(ungrouped))
        patch.setattr(topk, "_post_process_topk_ids", self._hooked(topk._post_process_topk_ids))
        if device == "cpu":  # the way that a GPU takes
            patch.setattr(topk, "get_moe_runner_backend", SimpleNamespace, raising=False)

    def set_budget(self, budget: int) -> None:
        self.worker.enforcement.set_budgets(budget, budget)
        self.worker.enforcement.begin_forward("decode", TOKENS)

    def route(self, layer: int, logits: torch.Tensor) -> Any:
        plugin_routing.before_select_experts(None, logits, self.configs[layer])
        return self._topk.select_experts(
            torch.zeros(len(logits), 8, device=self._device),
            logits,
            self.configs[layer],
            layer_id=layer,
        )

    def _router(self, index: int) -> Any:
        """Return a stand-in for SGLang's module of a layer: it routes, and has a configuration."""

        def router(_hidden_states: torch.Tensor, logits: torch.Tensor) -> Any:
            return self.route(index, logits)

        router.topk_config = self.configs[index]  # type: ignore[attr-defined]
        return router

    def _gate(self, original: Any) -> Any:
        eager = getattr(original, "_torchdynamo_orig_callable", original)

        def counted(**arguments: Any) -> Any:
            self.gate_calls += 1
            self.gate_types.add(arguments["gating_output"].dtype)
            known = eager.__code__.co_varnames[: eager.__code__.co_argcount]
            return eager(**{name: arguments[name] for name in known if name in arguments})

        return functools.partial(plugin_routing.around_gate, counted)

    def _hooked(self, original: Any) -> Any:
        def hooked(**given: Any) -> Any:
            changed = plugin._before_routed_slots(**given)
            return original(**(given if changed is None else changed[1]))

        return hooked


def _logits(device: str) -> torch.Tensor:
    made_up = torch.Generator().manual_seed(3)
    return torch.randn(TOKENS, EXPERTS, generator=made_up).to(device)


def _by_expert(routed: Any) -> torch.Tensor:
    """Return the weights as (T, E), so that the order of slots does not matter."""
    dense = torch.zeros(TOKENS, EXPERTS + 1)
    return dense.scatter_(1, routed.topk_ids.cpu().long() + 1, routed.topk_weights.cpu().float())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("mode", ["layer", "threshold", "token", "union"])
def test_our_routing_is_sglangs_and_then_the_drop(
    name: str, mode: str, device: str, engine_topk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = _Server(engine_topk, name, mode, device, monkeypatch)
    logits = _logits(device)
    for budget in BUDGETS:
        server.set_budget(budget)
        ours = [server.route(layer, logits) for layer in range(LAYERS)]
        assert (server.gate_calls, server.worker.dropped) == (0, 0)  # the drop behind SGLang's
        plugin_routing._process.routing = None
        theirs = [server.route(layer, logits) for layer in range(LAYERS)]
        assert (server.gate_calls, server.worker.dropped) == (LAYERS, LAYERS)
        plugin_routing._process.routing = server.routing
        server.gate_calls = server.worker.dropped = 0
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal((mine.topk_ids >= 0).sum(1), (other.topk_ids >= 0).sum(1))
            torch.testing.assert_close(_by_expert(mine), _by_expert(other))


def test_a_gate_called_outside_select_experts_is_sglangs(
    device: str, engine_topk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = _Server(engine_topk, "one group", "layer", device, monkeypatch)
    server.set_budget(FULL)
    logits = _logits(device)
    server.route(0, logits)
    engine_topk.grouped_topk(
        hidden_states=logits,
        gating_output=logits,
        topk=TOP_K,
        renormalize=False,
        num_expert_group=1,
        topk_group=1,
    )
    assert server.gate_calls == 1


def test_the_proof_keeps_layers_that_agree_and_leaves_the_others_to_sglang(
    device: str, engine_topk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = _Server(engine_topk, "one group", "layer", device, monkeypatch)
    honest = server.routers[1]

    def other_weights(hidden_states: torch.Tensor, logits: torch.Tensor) -> Any:
        routed = honest(hidden_states, logits)
        factor = 1.001 if server.routing._was_ours else 1.0
        return routed._replace(topk_weights=routed.topk_weights * factor)

    server.routing.prove(server.routers | {1: other_weights})
    server.gate_calls = 0
    server.set_budget(FULL)
    server.route(0, _logits(device))
    assert server.gate_calls == 0
    server.route(1, _logits(device))
    assert server.gate_calls == 1
    assert server.worker.agreed == [",".join(str(i) for i in range(LAYERS) if i != 1)]


def test_a_layer_that_breaks_ties_of_bfloat16_logits_otherwise_is_left_to_sglang(
    device: str,
    engine_topk: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = _Server(engine_topk, "no groups", "layer", device, monkeypatch)
    asked: list[torch.dtype] = []

    def gate(**arguments: Any) -> Any:
        """SGLang's routing on a GPU: ties to the smaller id, here to the greater one in layer 1."""
        logits = arguments["gating_output"]
        asked.append(logits.dtype)
        is_other = server.routing._config is server.configs[1] and logits.dtype == torch.bfloat16
        order = logits.float().flip(1) if is_other else logits.float()
        ids = order.argsort(dim=1, descending=True, stable=True)[:, :TOP_K]
        ids = EXPERTS - 1 - ids if is_other else ids
        weights = logits.float().softmax(dim=1).gather(1, ids)
        return weights / weights.sum(dim=1, keepdim=True), ids.int()

    hooked = functools.partial(plugin_routing.around_gate, gate)
    monkeypatch.setattr(engine_topk, "fused_topk", hooked)
    server.routing.prove(server.routers)
    assert set(asked) == {torch.float32, torch.bfloat16}
    assert server.routing._layers == set(range(LAYERS)) - {1}
    assert "bfloat16 logits" in caplog.text


@pytest.mark.parametrize(
    ("name", "types"),
    [("groups", {torch.float32}), ("no groups", {torch.float32, torch.bfloat16})],
)
def test_the_proof_asks_sglang_only_for_logits_that_we_would_route(
    name: str,
    types: set[torch.dtype],
    device: str,
    engine_topk: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any other type would have SGLang's `grouped_topk` compiled for nothing."""
    server = _Server(engine_topk, name, "layer", device, monkeypatch)
    # A CPU's stand-in for `fused_topk` leaves ties to torch: how they fall is not asked here.
    monkeypatch.setattr(plugin_routing, "_same_slots", lambda _theirs, _ours: True)
    server.routing.prove(server.routers)
    assert server.gate_types == types


def test_logits_in_service_that_are_not_ours_are_told_once(
    device: str,
    engine_topk: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = _Server(engine_topk, "groups", "layer", device, monkeypatch)
    server.routing.prove(server.routers)
    server.set_budget(FULL)
    server.gate_calls = 0
    caplog.clear()
    for layer in (0, 1):
        server.route(layer, _logits(device).bfloat16())
    assert server.gate_calls == 2
    assert caplog.text.count("SGLang goes on to route MoE layer 0 itself") == 1
    assert "layer 1 " not in caplog.text


def test_where_no_layer_is_ours_the_server_is_refused(
    device: str, engine_topk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = _Server(engine_topk, "one group", "layer", device, monkeypatch)
    monkeypatch.setattr(plugin_routing, "router_of", lambda _arguments: None)
    with pytest.raises(UnsupportedServerError, match="SGLANG_ALLOC_ROUTING=fused was asked for"):
        server.routing.prove(server.routers)


def test_on_a_cpu_it_is_refused() -> None:
    worker = SimpleNamespace(model=SimpleNamespace(device_type="cpu"))
    with pytest.raises(UnsupportedServerError, match="needs a GPU"):
        plugin_routing.start(worker, {})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", plugin_routing._SIMULATIONS)
def test_a_simulated_routing_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang 0.5.23 writes it into the tensors that our kernel returned, dropped slots too."""
    worker = SimpleNamespace(model=SimpleNamespace(device_type="cuda"))
    monkeypatch.setattr(plugin_routing._process, "routing", None)
    monkeypatch.setenv(name, "False")
    plugin_routing.start(worker, {})  # type: ignore[arg-type]
    monkeypatch.setenv(name, "True")
    with pytest.raises(UnsupportedServerError, match=f"{name} overwrites what was chosen"):
        plugin_routing.start(worker, {})  # type: ignore[arg-type]


_GROUPED: dict[str, Any] = {
    "hidden_states": None,
    "gating_output": torch.zeros(1, 4),
    "topk": 2,
    "renormalize": True,
    "num_expert_group": 2,
    "topk_group": 1,
    "num_fused_shared_experts": 0,
    "routed_scaling_factor": 2.5,
    "apply_routed_scaling_factor_on_output": True,
    "scoring_func": "sigmoid",
}
_UNGROUPED = {
    name: value
    for name, value in _GROUPED.items()
    if name not in {"num_expert_group", "topk_group"}
} | {"scoring_func": "softmax", "apply_routed_scaling_factor_on_output": False}


def test_a_router_is_read_off_the_arguments_of_sglangs_functions() -> None:
    assert plugin_routing.router_of(_GROUPED) == Router(2, "sigmoid", True, 2, 1, 2.5)
    unscaled = _GROUPED | {"apply_routed_scaling_factor_on_output": False}
    assert plugin_routing.router_of(unscaled) == Router(2, "sigmoid", True, 2, 1, 1.0)
    assert plugin_routing.router_of(_UNGROUPED) == Router(2, "softmax", True)


@pytest.mark.parametrize(
    "arguments",
    [
        _GROUPED | {"num_fused_shared_experts": 1},
        _GROUPED | {"scoring_func": "sqrtsoftplus"},
        _GROUPED | {"renormalize": False},
        _GROUPED | {"gating_output": torch.zeros(1, 4, dtype=torch.bfloat16)},
        _UNGROUPED | {"scoring_func": "sigmoid"},
        _UNGROUPED | {"apply_routed_scaling_factor_on_output": True},
        _UNGROUPED | {"correction_bias": torch.zeros(4)},
    ],
    ids=[
        *("shared columns", "other scores", "scaled as they are", "rounded scores"),
        *("sigmoid alone", "scaled", "a bias"),
    ],
)
def test_what_our_kernel_does_not_reproduce_is_sglangs(arguments: dict[str, Any]) -> None:
    assert plugin_routing.router_of(arguments) is None


def test_scaling_behind_the_gate_leaves_the_layer_to_sglang() -> None:
    later = SimpleNamespace(routed_scaling_factor=2.5, apply_routed_scaling_factor_on_output=True)
    assert plugin_routing._scales_later(later, _UNGROUPED)
    assert not plugin_routing._scales_later(later, _GROUPED)
    later.routed_scaling_factor = 1.0
    assert not plugin_routing._scales_later(later, _UNGROUPED)
