"""Offline story, judging: what a rule really used, in activations and in distinct experts."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sglang_alloc.reference.architecture import ReferenceConfig
from sglang_alloc.reference.model import Allocation


class Usage(NamedTuple):
    """Measured, not asked for: layers are averaged, tokens weigh the same."""

    mean_k: float  # activations per token and layer
    distinct_experts: dict[int, float]  # per layer and decode step, by batch size


class UsageCounter:
    """Wraps a rule and counts what it keeps, in passes over windows (B, S).

    Row b of a pass is a request and position s a decode step, so a decode batch of n requests is n
    rows at one position: it uses the union of their kept experts.
    """

    def __init__(
        self, allocation: Allocation | None, config: ReferenceConfig, batch_sizes: Sequence[int]
    ) -> None:
        self._allocation, self._experts = allocation, config.num_experts
        self._kept = self._slots = 0
        self._distinct = {size: [0.0, 0] for size in batch_sizes}
        self.rows = 1  # of the pass under way

    def __call__(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        reduced = weights
        if self._allocation is not None:
            reduced = self._allocation(layer, x, ids, weights)
        kept = reduced != 0
        self._kept += int(kept.sum())
        self._slots += len(kept)
        self._count_distinct(ids, kept)
        return reduced

    def _count_distinct(self, ids: Tensor, kept: Tensor) -> None:
        used = torch.zeros(len(ids), self._experts, dtype=torch.bool)
        # A slot id occurs once per token, so no write of False can hide one of True.
        used = used.scatter_(1, ids, kept).view(self.rows, -1, self._experts)
        for size, sums in self._distinct.items():
            for start in range(0, self.rows - size + 1, size):
                counts = used[start : start + size].any(dim=0).sum(dim=1)
                sums[0] += float(counts.sum())
                sums[1] += len(counts)

    def usage(self) -> Usage:
        """Return the means over everything counted; batches that never occurred are left out."""
        distinct = {size: total / n for size, (total, n) in self._distinct.items() if n}
        return Usage(self._kept / max(1, self._slots), distinct)
