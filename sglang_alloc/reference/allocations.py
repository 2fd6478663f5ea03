"""Offline story, measuring: the served modes as rules for the reference model's routing.

They call the torch twins of the serving kernels, so what is calibrated is what is served.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sglang_alloc.reference.model import Allocation
from sglang_alloc_kernels.layer_quota import layer_quota_torch
from sglang_alloc_kernels.reference_mass import reference_factor_torch
from sglang_alloc_kernels.score_threshold import score_threshold_torch
from sglang_alloc_kernels.token_selection import token_selection_torch


def apply_kept(weights: Tensor, kept: Tensor, *, renormalize: bool) -> Tensor:
    """Zero the dropped slots of weights (T, K); `renormalize` restores each token's full mass.

    Without it the kept weights stay what the full top-k made them, which is reference
    renormalisation with k2 = K.
    """
    reduced = weights.masked_fill(~kept, 0.0)
    if not renormalize:
        return reduced
    return reduced * (weights.sum(-1, keepdim=True) / reduced.sum(-1, keepdim=True))


def layer_allocation(quotas: Sequence[int], *, renormalize: bool = False) -> Allocation:
    """Mode `layer`: every token keeps its top quotas[layer]."""

    def allocate(layer: int, _x: Tensor, _ids: Tensor, weights: Tensor) -> Tensor:
        kept = layer_quota_torch(weights, int(quotas[layer]))
        return apply_kept(weights, kept, renormalize=renormalize)

    return allocate


def token_allocation(quotas: Sequence[int]) -> Allocation:
    """Mode `token`: the tokens of a pass compete for quotas[layer] slots per token."""

    def allocate(layer: int, _x: Tensor, _ids: Tensor, weights: Tensor) -> Tensor:
        kept = token_selection_torch(weights, int(quotas[layer]))
        return apply_kept(weights, kept, renormalize=False)

    return allocate


def threshold_allocation(
    thresholds: Sequence[float], saliency: Tensor | None, *, renormalize: bool = False
) -> Allocation:
    """Mode `threshold`: slots whose score reaches thresholds[layer], and each token's best."""

    def allocate(layer: int, _x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        kept = score_threshold_torch(scores(layer, ids, weights, saliency), thresholds[layer])
        return apply_kept(weights, kept, renormalize=renormalize)

    return allocate


def referenced(
    allocation: Allocation, references: Sequence[int], saliency: Tensor | None
) -> Allocation:
    """Normalise what an allocation keeps in layer l by the mass of its best references[l] slots.

    Reference renormalisation (arXiv 2609.04575): the kept slots always count, so top-k changes
    nothing.
    """

    def allocate(layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        reduced = allocation(layer, x, ids, weights)
        slot_scores = scores(layer, ids, weights, saliency)
        return reduced * reference_factor_torch(
            weights, reduced > 0, slot_scores, int(references[layer])
        )

    return allocate


def scores(layer: int, ids: Tensor, weights: Tensor, saliency: Tensor | None) -> Tensor:
    """Weight times saliency (L, E) of each slot (T, K), or the weight alone."""
    return weights if saliency is None else weights * saliency[layer][ids]


class KeptCounter:
    """Wraps an allocation and counts what it keeps; `mean_kept[layer]` is per token."""

    def __init__(self, allocation: Allocation, num_layers: int) -> None:
        self._allocation = allocation
        self._kept = torch.zeros(num_layers, dtype=torch.int64)
        self._tokens = torch.zeros(num_layers, dtype=torch.int64)

    def __call__(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        reduced = self._allocation(layer, x, ids, weights)
        self._kept[layer] += int((reduced != 0).sum())
        self._tokens[layer] += len(weights)
        return reduced

    @property
    def mean_kept(self) -> Tensor:
        """Activations per token of each layer, (L,) float64."""
        return self._kept.double() / self._tokens
