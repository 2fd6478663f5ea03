"""Offline story, inside the engine: the factor per layer that makes up for what a probe drops.

Without its dropped slots a layer's output is too small on average. The gain is the least-squares
factor between the output of the kept slots and that of all of them. The layer's own kernels compute
both beside the engine's call, so quantisation and sharding are those that serve. The gain is
applied at once: a layer is calibrated behind layers that have theirs. Eager execution only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sglang_alloc.enforcement import RoutedSlots
from sglang_alloc.npz_file import write_npz


class GainRecorder:
    """Sums <full, kept> and <kept, kept> of each layer's output over all tokens of a probe."""

    def __init__(
        self,
        num_layers: int,
        all_reduce: Callable[[torch.Tensor], torch.Tensor],
        folder: Path | None,
    ) -> None:
        """`all_reduce` completes a rank's partial output; `folder` is None on all ranks but one."""
        self._products = np.zeros((2, num_layers))
        self._all_reduce = all_reduce
        self._folder = folder
        self._full: dict[int, RoutedSlots] = {}
        self._observing = False

    def attach(self, expert_layers: Sequence[torch.nn.Module]) -> None:
        """Observe each call of these layers, one for each MoE layer in order."""
        for index, layer in enumerate(expert_layers):
            layer.register_forward_pre_hook(self._hook_of(index), with_kwargs=True)

    def expect(self, layer_index: int, full: RoutedSlots) -> None:
        """Find the gain of the layer's next call, whose slots were these before some were dropped.

        The tensors must not be written over before that call.
        """
        self._full[layer_index] = full

    def finish(self, probe: int) -> None:
        """Write gains-PROBE.npz if anything was observed since the last call, and begin anew."""
        if self._folder is not None and self._products[1].any():
            write_npz(self._folder / f"gains-{probe}.npz", {"gains": self._gains()}, "gains")
        self._products[:] = 0.0
        self._full.clear()

    def _hook_of(self, index: int) -> Callable[..., Any]:
        def before(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            full = None if self._observing else self._full.pop(index, None)
            if full is None:
                return None
            states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            slots = kwargs["topk_output"] if "topk_output" in kwargs else args[-1]
            self._observing = True
            try:
                self._observe(index, layer, states, slots, full)
            finally:
                self._observing = False
            scaled = self._scaled(slots, full.num_shared, float(self._gains()[index]))
            if "topk_output" in kwargs:
                return args, {**kwargs, "topk_output": scaled}
            return (*args[:-1], scaled), kwargs

        return before

    def _observe(
        self, index: int, layer: Any, states: torch.Tensor, slots: Any, full: RoutedSlots
    ) -> None:
        def output(weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            routed = slots._replace(
                topk_weights=_without_shared(weights, full.num_shared, 0.0),
                topk_ids=_without_shared(ids, full.num_shared, -1),
            )
            # The engine may write its result over its input.
            return self._all_reduce(layer(states.clone(), routed)).double()

        whole = output(full.weights, full.ids)
        kept = output(slots.topk_weights, slots.topk_ids)
        self._products[:, index] += (float((whole * kept).sum()), float((kept * kept).sum()))

    def _gains(self) -> np.ndarray:
        full, kept = self._products
        gains: np.ndarray = np.divide(full, kept, out=np.ones_like(full), where=kept > 0)
        return gains

    @staticmethod
    def _scaled(slots: Any, num_shared: int, gain: float) -> Any:
        weights = slots.topk_weights.clone()
        weights[:, : weights.shape[1] - num_shared] *= gain
        return slots._replace(topk_weights=weights)


def _without_shared(columns: torch.Tensor, num_shared: int, value: float) -> torch.Tensor:
    if num_shared == 0:
        return columns
    columns = columns.clone()
    columns[:, -num_shared:] = value
    return columns
