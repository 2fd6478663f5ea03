"""Data story, step 8 on the CPU: run the experts of the kept slots only.

SGLang's native CPU path counts and sorts every slot, so it can neither take an id of -1 nor save
the work of one. `forward_gated_experts` computes plain gated experts from their weights;
`forward_kept_slots` asks the engine's own function, for every other kind of expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional

# (rows (S, H), weights (S, 1), ids (S, 1)) -> expert outputs (S, H)
ExpertForward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class GatedExperts(NamedTuple):
    """Experts that compute w2 @ (act(gate) * up), where w13 @ x holds the gate above the up half.

    w13: (E, 2I, H); w2: (E, H, I); act: maps a gate to a new tensor of its shape.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    act: Callable[[torch.Tensor], torch.Tensor]


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": lambda gate: functional.gelu(gate, approximate="tanh"),
}


def gated_experts(layer: Any, moe_runner_config: Any) -> GatedExperts | None:
    """Read a layer of the engine as plain gated experts, or None when it is of another kind.

    Biases, clamped or scaled activations and weights on the input make another kind.
    """
    act = _ACTIVATIONS.get(moe_runner_config.activation)
    special, biases = ("gemm1_alpha", "gemm1_clamp_limit"), ("w13_weight_bias", "w2_weight_bias")
    if (
        act is None
        or any(getattr(moe_runner_config, name, None) is not None for name in special)
        or any(getattr(layer, name, None) is not None for name in biases)
    ):
        return None
    return GatedExperts(layer.w13_weight, layer.w2_weight, act)


def forward_experts(
    original: Callable[..., torch.Tensor],
    layer: Any,
    x: torch.Tensor,
    topk_output: Any,
    moe_runner_config: Any,
    *,
    is_gated: bool,
) -> torch.Tensor:
    """Return what the engine's function `original` would, of the slots that were not dropped.

    is_gated: the layer was seen to compute as `forward_gated_experts` does.
    """
    weights, ids = topk_output.topk_weights, topk_output.topk_ids
    if is_gated:
        experts = gated_experts(layer, moe_runner_config)
        assert experts is not None  # as when it was seen
        return forward_gated_experts(experts, x, weights, ids)

    def expert_forward(
        rows: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        one_slot = topk_output._replace(topk_weights=weights, topk_ids=ids)
        return original(layer, rows, one_slot, moe_runner_config)

    return forward_kept_slots(expert_forward, x, weights, ids)


def forward_gated_experts(
    experts: GatedExperts,
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> torch.Tensor:
    """Return the mixture (T, H) of the slots whose id is not -1.

    hidden_states: (T, H); topk_weights: (T, K) float32; topk_ids: (T, K) int. Weights are applied
    in their own precision after the experts, as the engine does. A token without any kept slot
    (a padding row) gets zeros.
    """
    slot_ids = topk_ids.reshape(-1)
    dropped, *counts = (slot_ids + 1).bincount(minlength=len(experts.w13) + 1).tolist()
    by_expert = slot_ids.argsort()[dropped:]
    rows = hidden_states.index_select(0, by_expert // topk_ids.shape[1])
    outputs = hidden_states.new_empty(len(rows) + 1, hidden_states.shape[1])
    outputs[-1].zero_()  # what dropped slots add
    start = 0
    for expert, count in enumerate(counts):
        if count:
            end = start + count
            gate, up = functional.linear(rows[start:end], experts.w13[expert]).chunk(2, dim=1)
            hidden = experts.act(gate).mul_(up)
            torch.mm(hidden, experts.w2[expert].t(), out=outputs[start:end])
            start = end
    row_of_slot = by_expert.new_full(slot_ids.shape, start)
    row_of_slot[by_expert] = torch.arange(start)
    return _weighted_sum(outputs, row_of_slot.view(topk_ids.shape), topk_weights)


def forward_kept_slots(
    expert_forward: ExpertForward,
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> torch.Tensor:
    """Return what `forward_gated_experts` returns, with the experts computed by `expert_forward`.

    The kept slots are laid out as a batch of their own, one slot a row.
    """
    token_index, slot_index = (topk_ids >= 0).nonzero(as_tuple=True)
    num_kept = len(token_index)
    if num_kept == 0:
        return torch.zeros_like(hidden_states)
    ids = topk_ids[token_index, slot_index].unsqueeze(1)
    ones = torch.ones(num_kept, 1, dtype=topk_weights.dtype)
    outputs = expert_forward(hidden_states[token_index], ones, ids)
    row_of_slot = token_index.new_full(topk_ids.shape, num_kept)
    row_of_slot[token_index, slot_index] = torch.arange(num_kept)
    return _weighted_sum(functional.pad(outputs, (0, 0, 0, 1)), row_of_slot, topk_weights)


def _weighted_sum(
    outputs: torch.Tensor, row_of_slot: torch.Tensor, topk_weights: torch.Tensor
) -> torch.Tensor:
    """Sum each token's rows of `outputs` (S + 1, H), weighted; returns (T, H).

    An embedding bag does this in one pass, without a copy of the rows in the order of the tokens.
    """
    mixture = functional.embedding_bag(
        row_of_slot,
        outputs.to(topk_weights.dtype),
        mode="sum",
        per_sample_weights=topk_weights,
    )
    return mixture.to(outputs.dtype)
