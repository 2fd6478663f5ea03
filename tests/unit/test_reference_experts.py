"""The reference model's experts against plain torch."""

import torch
from torch.nn import functional

from sglang_alloc.reference.experts import expert_output_norms, run_experts


def _make_inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 5), (6, 2), (4, 6, 5), (4, 5, 3))
    tensors = [torch.randn(s, generator=generator, dtype=dtype, requires_grad=True) for s in shapes]
    ids = torch.tensor([[0, 1], [1, 3], [0, 3], [1, 0], [3, 1], [0, 1]])  # expert 2 is unused
    return (*tensors, ids)


def _plain(x, weights, gate_up, down, ids):
    out = torch.zeros_like(x)
    for token, experts in enumerate(ids.tolist()):
        for slot, expert in enumerate(experts):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            hidden = down[expert] @ (functional.silu(gate) * up)
            out[token] = out[token] + weights[token, slot] * hidden
    return out


def test_experts_equal_a_loop_over_tokens() -> None:
    inputs = _make_inputs()
    torch.testing.assert_close(run_experts(*inputs), _plain(*inputs))


def test_gradients_equal_numerical_ones() -> None:
    assert torch.autograd.gradcheck(run_experts, _make_inputs())


def test_slot_of_weight_zero_contributes_nothing() -> None:
    x, weights, gate_up, down, ids = (t.detach() for t in _make_inputs())
    weights[:, 1] = 0
    alone = run_experts(x, weights[:, :1], gate_up, down, ids[:, :1])
    torch.testing.assert_close(run_experts(x, weights, gate_up, down, ids), alone)


def test_output_norms_ignore_the_router_weight() -> None:
    x, _, gate_up, down, ids = (t.detach() for t in _make_inputs())
    sums, counts = expert_output_norms(x, gate_up, down, ids)
    assert counts.tolist() == [4, 5, 0, 3]
    ones = torch.ones(len(x), 1, dtype=x.dtype)
    only_three = torch.full((len(x), 1), 3)
    outputs = run_experts(x, ones, gate_up, down, only_three)
    chosen = (ids == 3).any(1)
    torch.testing.assert_close(sums[3], outputs[chosen].norm(dim=1).sum())
