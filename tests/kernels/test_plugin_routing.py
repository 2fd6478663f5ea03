"""Routing by one kernel of ours, under SGLang's own `select_experts`."""

from __future__ import annotations

import functools
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_device_enforcement import BUDGETS, EXPERTS, FULL, LAYERS, TOP_K, _make_tables

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


@pytest.fixture(scope="module")
def engine_topk() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang.srt.layers.moe import topk
    return topk


class _Worker:
    """Worker, as far as routing needs it, on the device under test."""

    def __init__(self, tables: EnforcementTables, device: str) -> None:
        self.mode = tables.mode
        self.enforcement = DeviceEnforcement(tables, torch.device(device), KERNELS)
        self.model = SimpleNamespace(
            num_experts=EXPERTS, device_type=device, layer_ids=tuple(range(LAYERS))
        )
        self.dropped = 0  # calls of the drop behind SGLang's own routing

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
        tables = _make_tables(mode)
        plain = [
            rows._replace(gains=None, references=None) for rows in (tables.prefill, tables.decode)
        ]
        # Without saliency thresholds are of weights, which these configurations differ in.
        tables = tables._replace(prefill=plain[0], decode=plain[1], saliency=None)
        self.worker, self._topk, self._device = _Worker(tables, device), topk, device
        self.configs = [topk.TopKConfig(top_k=TOP_K, **CONFIGS[name]) for _ in range(LAYERS)]
        self.routers = {index: self._router(config) for index, config in enumerate(self.configs)}
        layer_index_of = {id(config): index for index, config in enumerate(self.configs)}
        self.routing = plugin_routing.FusedRouting(self.worker, layer_index_of)  # type: ignore[arg-type]
        self.gate_calls = 0
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

    def _router(self, config: Any) -> Any:
        return lambda _, logits: self.route(self.configs.index(config), logits)

    def _gate(self, original: Any) -> Any:
        eager = getattr(original, "_torchdynamo_orig_callable", original)

        def counted(**arguments: Any) -> Any:
            self.gate_calls += 1
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
        return routed._replace(topk_weights=routed.topk_weights * (1 + 1e-3 * server.gate_calls))

    server.routing.prove(server.routers | {1: other_weights})
    server.gate_calls = 0
    server.set_budget(FULL)
    server.route(0, _logits(device))
    assert server.gate_calls == 0
    server.route(1, _logits(device))
    assert server.gate_calls == 1


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
