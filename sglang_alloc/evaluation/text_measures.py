"""Offline story, judging: loss, divergence and agreement with the full model, window by window."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sglang_alloc.evaluation.usage import Usage, UsageCounter
from sglang_alloc.reference.model import Allocation, ReferenceModel

BATCH_SIZES = (8, 16, 32)
ROWS_PER_PASS = 32  # a decode batch of the largest size fits into one pass


class TextMeasures(NamedTuple):
    """Means over the tokens of each window, (W,) float64."""

    nll: Tensor  # nats per token
    kl: Tensor  # nats per token, of the full model's distribution from the rule's
    agreement: Tensor  # share of tokens whose most likely successor is the full model's
    usage: Usage


@torch.no_grad()
def full_log_probabilities(model: ReferenceModel, windows: Tensor) -> Tensor:
    """Return what the full model says of each next token: (W, S, V), for windows (W, S + 1)."""
    parts = [
        model(part[:, :-1]).logits.log_softmax(-1) for part in torch.split(windows, ROWS_PER_PASS)
    ]
    return torch.cat(parts)


@torch.no_grad()
def measure_text(
    model: ReferenceModel,
    allocation: Allocation | None,
    windows: Tensor,
    full: Tensor,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> TextMeasures:
    """Measure a rule on windows (W, S + 1) against `full`, the full model's log-probabilities."""
    counter = UsageCounter(allocation, model.config, batch_sizes)
    columns: list[Tensor] = []
    for start in range(0, len(windows), ROWS_PER_PASS):
        part = windows[start : start + ROWS_PER_PASS]
        counter.rows = len(part)
        found = model(part[:, :-1], counter).logits.log_softmax(-1)
        columns.append(_per_window(found, full[start : start + ROWS_PER_PASS], part[:, 1:]))
    nll, kl, agreement = torch.cat(columns, dim=1).double()
    return TextMeasures(nll, kl, agreement, counter.usage())


def _per_window(found: Tensor, full: Tensor, targets: Tensor) -> Tensor:
    """NLL, KL and agreement of each row, (3, B)."""
    nll = functional.nll_loss(found.transpose(1, 2), targets, reduction="none").mean(1)
    kl = functional.kl_div(found, full, log_target=True, reduction="none").sum(-1).mean(1)
    agreement = (found.argmax(-1) == full.argmax(-1)).float().mean(1)
    return torch.stack([nll, kl, agreement])
