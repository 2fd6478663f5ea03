"""Offline story, inside the engine: how large each expert's output is on the tokens that chose it.

Each expert layer computes its slots one by one beside the engine's own call, so the norms are those
of the kernels, the quantisation and the sharding that serve. Eager execution only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sglang_alloc.npz_file import write_npz

FILE_NAME = "saliency.npz"


class SaliencyRecorder:
    """Sums the norms of the experts' unweighted outputs, (L, E), over all tokens seen."""

    def __init__(
        self,
        shape: tuple[int, int],
        all_reduce: Callable[[torch.Tensor], torch.Tensor],
        folder: Path | None,
    ) -> None:
        """`shape` is (L, E); `all_reduce` completes a rank's partial output.

        `folder` receives the sums; it is None on all ranks but one.
        """
        self._sums = np.zeros(shape)
        self._counts = np.zeros(shape, np.int64)
        self._all_reduce = all_reduce
        self._folder = folder
        self._observing = False
        self._is_over = False

    def measured(self) -> np.ndarray | None:
        """Return (L, E) saliency, None before any token; from then on nothing is observed."""
        if not self._counts.any():
            return None
        self._is_over = True
        return saliency_of(self._sums, self._counts)

    def attach(self, expert_layers: Sequence[torch.nn.Module]) -> None:
        """Observe each call of these layers, one for each MoE layer in order."""
        for index, layer in enumerate(expert_layers):
            layer.register_forward_pre_hook(self._hook_of(index), with_kwargs=True)

    def _hook_of(self, index: int) -> Callable[..., None]:
        def before(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._observing or self._is_over:
                return
            hidden_states = kwargs.get("hidden_states", args[0] if args else None)
            topk_output = kwargs.get("topk_output", args[-1] if args else None)
            self._observing = True
            try:
                self._observe(index, layer, hidden_states, topk_output)
            finally:
                self._observing = False

        return before

    def _observe(self, index: int, layer: Any, hidden_states: Any, topk_output: Any) -> None:
        ids = topk_output.topk_ids
        num_experts = self._sums.shape[1]
        for slot in range(ids.shape[1]):
            chosen = ids[:, slot : slot + 1]
            routed = (chosen[:, 0] >= 0) & (chosen[:, 0] < num_experts)
            if not bool(routed.any()):
                continue
            ones = torch.ones_like(topk_output.topk_weights[:, slot : slot + 1])
            single = topk_output._replace(topk_weights=ones, topk_ids=chosen.contiguous())
            # The engine may write its result over its input.
            output = self._all_reduce(layer(hidden_states.clone(), single))
            self._add(index, chosen[routed, 0], output[routed].float().norm(dim=1))
        if index == len(self._sums) - 1:
            self._write()

    def _add(self, index: int, ids: torch.Tensor, norms: torch.Tensor) -> None:
        experts = ids.long().cpu().numpy()
        np.add.at(self._sums[index], experts, norms.double().cpu().numpy())
        np.add.at(self._counts[index], experts, 1)

    def _write(self) -> None:
        if self._folder is not None:
            fields = {"sums": self._sums, "counts": self._counts}
            write_npz(self._folder / FILE_NAME, fields, "sums of saliency")


def saliency_of(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return (L, E) float64 mean norms; an expert that no token chose gets its layer's mean."""
    seen = counts.sum(axis=1, keepdims=True)
    typical = sums.sum(axis=1, keepdims=True) / np.maximum(seen, 1)
    saliency: np.ndarray = np.where(counts > 0, sums / np.maximum(counts, 1), typical)
    return saliency
