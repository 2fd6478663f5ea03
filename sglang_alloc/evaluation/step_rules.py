"""Offline story, judging: rules over the tokens of a decode step, and rules that change midway.

A pass over windows (B, S) stands for decoding: its rows are requests and its positions steps. As
attention is causal, a position sees exactly the keys and values that its predecessors made under
the rule that was in force for them.
"""

import torch
from torch import Tensor

from sglang_alloc.reference.model import Allocation


def by_step(rule: Allocation, steps: int) -> Allocation:
    """Apply a rule that looks at all tokens of a forward to the rows of each position apart."""

    def allocate(layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        reduced = torch.empty_like(weights)
        for step in range(steps):
            row = slice(step, None, steps)
            reduced[row] = rule(layer, x[row], ids[row], weights[row])
        return reduced

    return allocate


def switched(
    before: Allocation | None, after: Allocation | None, at: int, steps: int
) -> Allocation:
    """Follow `before` at the positions below `at` and `after` from there on."""

    def allocate(layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        early = weights if before is None else before(layer, x, ids, weights)
        late = weights if after is None else after(layer, x, ids, weights)
        position = torch.arange(len(weights)) % steps
        return torch.where((position < at)[:, None], early, late)

    return allocate
