"""The CPU experts over kept slots only, against the plain definition of the mixture."""

from __future__ import annotations

import torch

from sglang_alloc.cpu_moe import forward_kept_slots

TOKENS, TOP_K, EXPERTS, HIDDEN = 9, 3, 5, 8
MATRICES = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(2))


def _expert_forward(rows: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Stands in for the engine's function: one matrix per expert."""
    assert int(ids.min()) >= 0
    return torch.einsum("sh,sho->so", rows, MATRICES[ids[:, 0]]) * weights


def _make_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden_states = torch.randn(TOKENS, HIDDEN, generator=generator)
    weights, ids = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOP_K)
    return hidden_states, weights, ids


def test_dropped_slots_add_nothing_and_kept_ones_their_weighted_output() -> None:
    hidden_states, weights, ids = _make_batch()
    ids[0, 1] = ids[3, 0] = ids[3, 2] = -1
    mixture = forward_kept_slots(_expert_forward, hidden_states, weights, ids)
    for token in range(TOKENS):
        expected = sum(
            weights[token, slot] * (hidden_states[token] @ MATRICES[ids[token, slot]])
            for slot in range(TOP_K)
            if ids[token, slot] >= 0
        )
        torch.testing.assert_close(mixture[token], expected)


def test_a_batch_of_padding_rows_gives_zeros_in_the_dtype_of_the_input() -> None:
    hidden_states, weights, ids = _make_batch()
    mixture = forward_kept_slots(
        _expert_forward, hidden_states.bfloat16(), weights, torch.full_like(ids, -1)
    )
    assert mixture.dtype == torch.bfloat16
    assert not mixture.any()
