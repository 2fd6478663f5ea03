"""Data story, step 8 on the CPU: run the experts of the kept slots only.

SGLang's native CPU path counts and sorts every slot, so it can neither take an id of -1 nor save
the work of one. Here the kept slots are laid out as a batch of their own, one slot a row, for the
engine's function to compute, and their outputs are summed back into the tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# (rows (S, H), weights (S, 1), ids (S, 1)) -> expert outputs (S, H)
ExpertForward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def forward_kept_slots(
    expert_forward: ExpertForward,
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> torch.Tensor:
    """Return the mixture (T, H) of the slots whose id is not -1.

    hidden_states: (T, H); topk_weights: (T, K) float32; topk_ids: (T, K) int. Weights are applied
    in their own precision after the experts, as the engine does. A token without any kept slot
    (a padding row) gets zeros.
    """
    token_index, slot_index = (topk_ids >= 0).nonzero(as_tuple=True)
    mixture = torch.zeros(
        hidden_states.shape, dtype=topk_weights.dtype, device=hidden_states.device
    )
    if len(token_index) == 0:
        return mixture.to(hidden_states.dtype)
    weights = topk_weights[token_index, slot_index].unsqueeze(1)
    ids = topk_ids[token_index, slot_index].unsqueeze(1)
    outputs = expert_forward(hidden_states[token_index], torch.ones_like(weights), ids)
    mixture.index_add_(0, token_index, outputs.to(weights.dtype) * weights)
    return mixture.to(hidden_states.dtype)
