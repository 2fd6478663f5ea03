"""The steps that every rule shares: the score of a slot before it, the weights and ids after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from sglang_alloc_kernels.drop_slots import DROPPED
from sglang_alloc_kernels.layer_rows import LayerRows, StepTensors
from sglang_alloc_kernels.reference_mass import reference_factor_torch
from sglang_alloc_kernels.slot_rank import slot_rank_torch
from sglang_alloc_kernels.step_statistics import add_to_sums_torch


class ScoredSlots(NamedTuple):
    """One layer's routed slots, (T, K) each: weights, ids (-1: absent), scores, ranks by score."""

    weights: torch.Tensor
    ids: torch.Tensor
    scores: torch.Tensor
    ranks: torch.Tensor

    def protected(self, step: StepTensors) -> torch.Tensor:
        """Return which tokens keep everything, (T, 1) bool."""
        num_tokens, top_k = self.ids.shape
        if step.floors is None:
            return torch.zeros(num_tokens, 1, dtype=torch.bool, device=self.ids.device)
        return step.floors[:num_tokens, None] >= top_k

    def capped(self, step: StepTensors) -> torch.Tensor:
        """Return which tokens have a ceiling below K, (T, 1) bool."""
        num_tokens, top_k = self.ids.shape
        if step.ceilings is None:
            return torch.zeros(num_tokens, 1, dtype=torch.bool, device=self.ids.device)
        return step.ceilings[:num_tokens, None] < top_k


KeepRule = Callable[[ScoredSlots], torch.Tensor]


def apply_rule_torch(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    rows: LayerRows,
    layer_index: int,
    rule: KeepRule,
    *,
    num_shared: int,
    step: StepTensors,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one layer's (weights, ids) after a rule decided which routed slots stay.

    topk_weights, topk_ids: (T, K + num_shared), the shared experts' columns last; those are never
    dropped, but are masked in padding rows like the rest.
    """
    if step.num_valid_tokens is not None:
        tokens = torch.arange(len(topk_ids), device=topk_ids.device)
        padding = (tokens >= step.num_valid_tokens)[:, None]
        topk_ids = topk_ids.masked_fill(padding, DROPPED)
        topk_weights = topk_weights.masked_fill(padding, 0.0)
    routed = topk_ids.shape[1] - num_shared
    slots = scored_slots_torch(topk_weights[:, :routed], topk_ids[:, :routed], rows, layer_index)
    weights, ids = finish_slots_torch(slots, rule(slots), rows, layer_index, step)
    return (
        torch.cat((weights, topk_weights[:, routed:]), dim=1),
        torch.cat((ids, topk_ids[:, routed:]), dim=1),
    )


def scored_slots_torch(
    weights: torch.Tensor, ids: torch.Tensor, rows: LayerRows, layer_index: int
) -> ScoredSlots:
    """Score the slots of a layer: weight times saliency, -inf for absent slots."""
    scores = weights.float()
    if rows.saliency is not None:
        scores = scores * rows.saliency[layer_index][ids.clamp(min=0).long()]
    scores = scores.masked_fill(ids < 0, float("-inf"))
    return ScoredSlots(weights, ids, scores, slot_rank_torch(scores))


def finish_slots_torch(
    slots: ScoredSlots, kept: torch.Tensor, rows: LayerRows, layer_index: int, step: StepTensors
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the layer's (weights, ids), both (T, K), after floors, ceilings, and corrections.

    kept: (T, K) bool, the rule's decision. Dropped slots get id -1 and weight 0.
    """
    num_tokens = len(kept)
    if step.floors is not None:
        kept = kept | (slots.ranks < step.floors[:num_tokens, None])
    if step.ceilings is not None:
        kept = kept & (slots.ranks < step.ceilings[:num_tokens, None])
    kept = kept & (slots.ids >= 0)
    if step.sums is not None:
        add_to_sums_torch(step.sums, layer_index, slots.weights, slots.ids, kept)
    weights = slots.weights * _factor(slots, kept, rows, layer_index, step)
    weights = weights.to(slots.weights.dtype).masked_fill(~kept, 0.0)
    return weights, slots.ids.masked_fill(~kept, DROPPED)


def _factor(
    slots: ScoredSlots, kept: torch.Tensor, rows: LayerRows, layer_index: int, step: StepTensors
) -> torch.Tensor:
    """Return what each token's weights are multiplied by, (T, 1) float32."""
    factor = torch.ones(len(kept), 1, device=kept.device)
    if rows.references is not None:
        present = slots.weights.float().masked_fill(slots.ids < 0, 0.0)
        reference = rows.references[layer_index]
        factor = reference_factor_torch(present, kept, slots.scores, reference)
    if rows.gains is not None:
        factor = factor * torch.where(slots.protected(step), 1.0, rows.gains[layer_index])
    return factor
