"""Tables and routed slots that the tests of the budget on an accelerator share."""

from __future__ import annotations

import numpy as np
import torch

from sglang_alloc.enforcement import EnforcementTables, PhaseRows, RoutedSlots

LAYERS, TOP_K, EXPERTS, TOKENS = 2, 6, 60, 11
BUDGET_MIN, FULL = LAYERS, LAYERS * TOP_K
BUDGETS = (BUDGET_MIN, 5, 8, FULL)
# In mode `union` thresholds open the set, or the best slots of each token.
MODES = ("layer", "threshold", "token", "union", "union by quotas")


def make_tables(mode: str) -> EnforcementTables:
    """Rows that differ between layers and phases, with saliency and every correction."""
    budgets = np.arange(BUDGET_MIN, FULL + 1)
    quotas = ((budgets[:, None] + np.arange(LAYERS)) // LAYERS).astype(np.int16)
    thresholds = np.linspace(0.3, 0.0, len(budgets), dtype=np.float32)[:, None]
    thresholds = thresholds * np.array([[1.0, 0.5]], np.float32)
    references = np.minimum(quotas + 2, TOP_K)
    decode = PhaseRows(
        quotas,
        None if mode == "union by quotas" else thresholds,
        np.full_like(thresholds, 1.25),
        references,
    )
    mode = mode.partition(" ")[0]
    prefill = decode._replace(quotas=quotas[:, ::-1].copy(), thresholds=thresholds[:, ::-1].copy())
    saliency = np.random.default_rng(5).uniform(0.5, 1.5, (LAYERS, EXPERTS)).astype(np.float32)
    return EnforcementTables(
        mode=mode,  # type: ignore[arg-type]
        top_k=TOP_K,
        budget_min=BUDGET_MIN,
        budget_max=FULL,
        prefill=prefill,
        decode=decode,
        saliency=saliency,
        num_experts=EXPERTS,
        prefill_mode="layer" if mode == "union" else None,
    )


def make_slots(
    tokens: int = TOKENS, num_shared: int = 0, *, renormalize: bool = True
) -> RoutedSlots:
    logits = torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(tokens))
    weights, ids = logits.softmax(dim=1).topk(TOP_K, dim=1)
    if renormalize:
        weights = weights / weights.sum(1, keepdim=True)
    shared = torch.full((tokens, num_shared), EXPERTS)
    return RoutedSlots(
        torch.cat([weights, torch.ones(tokens, num_shared)], 1),
        torch.cat([ids, shared], 1).int(),
        num_shared,
    )
