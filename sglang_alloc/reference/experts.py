"""Reference model: all experts of one MoE layer as one differentiable step, without padding."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def expert_slots(topk_ids: Tensor, num_experts: int) -> list[Tensor]:
    """For each expert, its slots in `topk_ids.view(-1)`: int64, ascending; possibly empty."""
    flat = topk_ids.reshape(-1)
    counts = torch.bincount(flat, minlength=num_experts)
    return list(torch.split(torch.sort(flat, stable=True).indices, counts.tolist()))


class _Experts(torch.autograd.Function):
    """SwiGLU experts, one after the other: each one's tokens stay in cache from end to end."""

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd passes by position)
        ctx: Any, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, topk_ids: Tensor
    ) -> Tensor:
        slots = expert_slots(topk_ids, gate_up.shape[0])
        top_k, flat_weights = topk_ids.shape[1], weights.reshape(-1)
        out = torch.zeros_like(x)
        projections = []
        if not ctx.needs_input_grad[0]:  # a dropped slot then costs nothing
            slots = [slot[flat_weights[slot] != 0] for slot in slots]
        for expert, slot in enumerate(slots):
            token = slot // top_k
            projection = x[token] @ gate_up[expert].T
            gate, up = projection.chunk(2, dim=-1)
            hidden = functional.silu(gate) * up * flat_weights[slot].unsqueeze(-1)
            out.index_add_(0, token, hidden @ down[expert].T)
            projections.append(projection)
        ctx.save_for_backward(x, weights, gate_up, down, *slots, *projections)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, gate_up, down, *rest = ctx.saved_tensors
        count = gate_up.shape[0]
        top_k, flat_weights = weights.shape[1], weights.reshape(-1)
        grad_x, grad_weights = torch.zeros_like(x), torch.zeros_like(flat_weights)
        grad_gate_up, grad_down = torch.zeros_like(gate_up), torch.zeros_like(down)
        for expert, (slot, projection) in enumerate(zip(rest[:count], rest[count:], strict=True)):
            token = slot // top_k
            weight = flat_weights[slot].unsqueeze(-1)
            gate, up = projection.chunk(2, dim=-1)
            sigmoid = torch.sigmoid(gate)
            silu = gate * sigmoid
            hidden, grad = silu * up, grad_out[token]
            grad_down[expert] = grad.T @ (hidden * weight)
            grad_hidden = grad @ down[expert]
            grad_weights[slot] = (grad_hidden * hidden).sum(-1)
            grad_hidden = grad_hidden * weight
            grad_gate = grad_hidden * up * (sigmoid + silu * (1 - sigmoid))
            grad_projection = torch.cat([grad_gate, grad_hidden * silu], dim=-1)
            grad_gate_up[expert] = grad_projection.T @ x[token]
            grad_x.index_add_(0, token, grad_projection @ gate_up[expert])
        return grad_x, grad_weights.view_as(weights), grad_gate_up, grad_down, None


def run_experts(
    x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, topk_ids: Tensor
) -> Tensor:
    """Weighted sum of each token's experts.

    x (T, H); weights and topk_ids (T, K); gate_up (E, 2I, H), gate rows first; down (E, H, I).
    Returns (T, H). A slot of weight 0 contributes exactly nothing. Gradients reach all but the ids.
    """
    out: Tensor = _Experts.apply(x, weights, gate_up, down, topk_ids)  # type: ignore[no-untyped-call]
    return out


def expert_output_norms(
    x: Tensor, gate_up: Tensor, down: Tensor, topk_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum over an expert's tokens of the norm of its unweighted output, and its token count: (E,).

    Their ratio over a calibration text is the expert's saliency.
    """
    sums = torch.zeros(gate_up.shape[0], dtype=torch.float64)
    counts = torch.zeros_like(sums)
    for expert, slot in enumerate(expert_slots(topk_ids, gate_up.shape[0])):
        gate, up = (x[slot // topk_ids.shape[1]] @ gate_up[expert].T).chunk(2, dim=-1)
        output = (functional.silu(gate) * up) @ down[expert].T
        sums[expert] = output.norm(dim=-1).sum().double()
        counts[expert] = len(slot)
    return sums, counts
