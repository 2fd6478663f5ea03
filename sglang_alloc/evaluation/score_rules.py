"""Offline story, judging: published rules that keep a slot when a score of it is large enough.

Each is calibrated to a mean number of slots, because rules are compared at equal activations and
never at equal parameters. A token's best slot always stays. All scores are functions of what the
served seam shows: the router's weights (T, K), largest first, and the experts' ids (T, K).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sglang_alloc.reference.allocations import apply_kept
from sglang_alloc.reference.model import Allocation, ReferenceModel
from sglang_alloc.reference.thresholds import threshold_of_scores
from sglang_alloc_kernels.score_threshold import score_threshold_torch

Score = Callable[[int, Tensor, Tensor], Tensor]  # (layer, ids, weights) -> (T, K)
GLOBAL_ROUNDS = 4  # after three the mean k of top-p moved by less than 0.1%


def weight(_layer: int, _ids: Tensor, weights: Tensor) -> Tensor:
    """The router's weight itself."""
    return weights


def ratio_to_best(_layer: int, _ids: Tensor, weights: Tensor) -> Tensor:
    """Weight relative to the token's best: NAEE's dynamic skipping (arXiv 2402.14800, eq. 6)."""
    return weights / weights[:, :1]


def mass_above(_layer: int, _ids: Tensor, weights: Tensor) -> Tensor:
    """Minus the mass of the larger slots: top-p keeps slots until p is reached (arXiv 2403.07652).

    Where the router renormalises, the mass is that within the top-k.
    """
    return weights - weights.cumsum(dim=1)


def expert_use(use: Tensor) -> Score:
    """How much the slot's expert is used, (L, E): too little, and it is taken out of the model."""

    def score(layer: int, ids: Tensor, _weights: Tensor) -> Tensor:
        return use[layer][ids]

    return score


def kept_by_score(score: Score, thresholds: Sequence[float]) -> Allocation:
    """Keep the slots of layer l whose score reaches thresholds[l], and each token's best."""

    def allocate(layer: int, _x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        kept = score_threshold_torch(score(layer, ids, weights), thresholds[layer])
        return apply_kept(weights, kept, renormalize=False)

    return allocate


@torch.no_grad()
def layerwise_thresholds(
    model: ReferenceModel, windows: Tensor, score: Score, quotas: Sequence[float]
) -> list[float]:
    """Thresholds at which layer l keeps quotas[l] slots, behind layers that have theirs already."""
    found: dict[int, float] = {}

    def allocate(layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        found[layer] = threshold_of_scores(score(layer, ids, weights), quotas[layer])
        return kept_by_score(score, [found.get(index, 0.0) for index in range(len(quotas))])(
            layer, x, ids, weights
        )

    model(windows[:, :-1], allocate)
    return [found[layer] for layer in range(len(quotas))]


@torch.no_grad()
def global_threshold(model: ReferenceModel, windows: Tensor, score: Score, quota: float) -> float:
    """One threshold for all layers, at which they keep `quota` slots on average.

    The scores depend on the layers before, which the threshold changes: a few rounds settle it.
    """
    threshold = float("-inf")
    for _ in range(GLOBAL_ROUNDS):
        seen: list[Tensor] = []
        rule = kept_by_score(score, [threshold] * model.config.num_layers)
        model(windows[:, :-1], _recording(rule, score, seen))
        threshold = threshold_of_scores(torch.cat(seen), quota)
    return threshold


def _recording(rule: Allocation, score: Score, seen: list[Tensor]) -> Allocation:
    def allocate(layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        seen.append(score(layer, ids, weights))
        return rule(layer, x, ids, weights)

    return allocate


@torch.no_grad()
def measure_expert_use(model: ReferenceModel, windows: Tensor, saliency: Tensor) -> Tensor:
    """Sum of weight times saliency over each expert's slots, (L, E) float32."""
    use = torch.zeros_like(saliency)

    def observe(layer: int, _x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        mass = (weights * saliency[layer][ids]).flatten()
        use[layer].scatter_add_(0, ids.flatten(), mass)
        return weights

    model(windows[:, :-1], observe)
    return use
