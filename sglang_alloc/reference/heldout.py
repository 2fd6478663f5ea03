"""Reference model: loss on text it was not trained on, in nats per byte."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from sglang_alloc.reference.model import Allocation, ReferenceModel


def windows_of(tokens: NDArray[np.int16], window_tokens: int, count_max: int) -> Tensor:
    """Cut at most `count_max` evenly spaced windows (B, window + 1), int64, that do not overlap."""
    count = min(count_max, (len(tokens) - 1) // window_tokens)
    starts = np.linspace(0, len(tokens) - 1 - window_tokens, count).astype(int)
    rows = [tokens[start : start + window_tokens + 1] for start in starts]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


@torch.no_grad()
def token_losses(
    model: ReferenceModel,
    windows: Tensor,
    allocation: Allocation | None = None,
    *,
    windows_per_pass: int = 8,
) -> Tensor:
    """Loss (B, S) of each next byte of windows (B, S + 1)."""
    losses = []
    for start in range(0, len(windows), windows_per_pass):
        part = windows[start : start + windows_per_pass]
        logits = model(part[:, :-1], allocation).logits.transpose(1, 2)
        losses.append(functional.cross_entropy(logits, part[:, 1:], reduction="none"))
    return torch.cat(losses)


def heldout_losses(model: ReferenceModel, windows: dict[str, Tensor]) -> dict[str, float]:
    """Mean loss per domain."""
    return {name: float(token_losses(model, rows).mean()) for name, rows in windows.items()}
