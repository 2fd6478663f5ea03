"""Mode `token`: the tokens of a forward compete for the slots above a base
(Alloc-MoE, arXiv 2604.08133, Alloc-T)."""

from __future__ import annotations

import torch

from sglang_alloc_kernels.slot_rank import slot_rank_torch

# The paper finds one guaranteed slot per token to be best.
BASE_SLOTS = 1


def token_selection_torch(
    scores: torch.Tensor, quota: int, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """Keep exactly `quota * valid tokens` slots: each token's best one, then the best of the rest.

    scores: (T, K) float; 1 <= quota <= K; valid: (T,) bool, False for padding rows, which keep
    nothing and count for nothing. Ties go to the earlier token, then the earlier slot, so every
    rank of a tensor-parallel group decides alike. Returns (T, K) bool. Host side: the number of
    valid rows is read, which costs a sync on a GPU.
    """
    rank = slot_rank_torch(scores)
    rows = torch.ones(len(scores), dtype=torch.bool) if valid is None else valid
    kept = (rank < BASE_SLOTS) & rows[:, None]
    extra = (quota - BASE_SLOTS) * int(rows.sum())
    candidates = (rank >= BASE_SLOTS) & rows[:, None]
    contest = torch.where(candidates & ~torch.isnan(scores), scores, float("-inf")).flatten()
    best = contest.argsort(descending=True, stable=True)[:extra]
    kept.view(-1)[best] = True
    return kept & rows[:, None]
