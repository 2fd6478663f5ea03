"""Offline story, inside the engine: how far a MoE layer's output moves at top-k, on Gaussian input.

Needs no text (LExI, arXiv 2509.02753). The layer's own router, experts, quantisation and sharding
compute it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sglang_alloc.errors import UnsupportedServerError
from sglang_alloc.npz_file import write_npz
from sglang_alloc_kernels.drop_slots import drop_slots_torch
from sglang_alloc_kernels.layer_quota import layer_quota_torch

FILE_NAME = "lexi.npz"
TOKENS = 1024
_SEED = 0


def record_deviations(
    blocks: Sequence[Any],
    top_k: int,
    all_reduce: Callable[[torch.Tensor], torch.Tensor],
    dropping: Callable[[bool], None],
    folder: Path | None,
) -> None:
    """Write the deviations (L, K) of all MoE blocks, one for each layer in order, to `folder`.

    Entry [l, k - 1] is the mean over tokens of ||Y_k - Y_K||, with the router's original weights.
    `folder` is None on all ranks but one; `all_reduce` completes a rank's partial output;
    `dropping` tells the engine whether slots of id -1 are to come.

    Raises:
        UnsupportedServerError: a block does not have a gate, a topk and experts of its own.
    """
    found = np.stack([_deviations(block, top_k, all_reduce, dropping) for block in blocks])
    if folder is not None:
        write_npz(folder / FILE_NAME, {"deviations": found}, "deviations")


@torch.no_grad()
def _deviations(
    block: Any,
    top_k: int,
    all_reduce: Callable[[torch.Tensor], torch.Tensor],
    dropping: Callable[[bool], None],
) -> np.ndarray:
    missing = [name for name in ("gate", "topk", "experts") if not hasattr(block, name)]
    if missing:
        raise UnsupportedServerError(
            f"Context lexi feeds Gaussian input to a layer's gate, topk and experts, and "
            f"{type(block).__name__} has no {' and no '.join(missing)}. Use another --context."
        )
    weight = block.gate.weight
    generator = torch.Generator().manual_seed(_SEED)
    x = torch.randn(TOKENS, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    dropping(False)
    logits = block.gate(x)
    full = block.topk(x, logits[0] if isinstance(logits, tuple) else logits)

    def output(k: int) -> torch.Tensor:
        kept = layer_quota_torch(full.topk_weights[:, :top_k], k)
        shared = torch.ones_like(full.topk_ids[:, top_k:], dtype=torch.bool)
        mask = torch.cat([kept, shared], dim=1)
        weights, ids = drop_slots_torch(full.topk_weights, full.topk_ids, mask)
        # The engine may write its result over its input.
        slots = full._replace(topk_weights=weights, topk_ids=ids)
        return all_reduce(block.experts(x.clone(), slots)).float()

    whole = output(top_k)
    dropping(True)
    found = [float((output(k) - whole).norm(dim=1).mean()) for k in range(1, top_k)]
    dropping(False)
    return np.array([*found, 0.0])
