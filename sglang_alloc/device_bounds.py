"""Data story, step 7 on a device: what requests with a budget of their own keep, token by token."""

from __future__ import annotations

import numpy as np
import torch

from sglang_alloc.enforcement import EnforcementTables
from sglang_alloc.errors import UnsupportedServerError

# No captured batch has more rows, so graphs never see the tensors of a larger forward.
GRAPH_ROWS = 32_768


class DeviceBounds:
    """Slots that each row keeps at least and at most in every layer, at fixed addresses.

    A row of full quality keeps all K. A budget above the one in force becomes the whole number of
    slots per layer that holds it, one below the number that it affords.
    """

    def __init__(self, tables: EnforcementTables, device: torch.device) -> None:
        self._num_layers = tables.decode.quotas.shape[1]
        self._top_k, self._full = tables.top_k, tables.budget_max
        self._device = device
        self._of_graphs = self._neutral(GRAPH_ROWS)
        self._of_large: tuple[torch.Tensor, torch.Tensor] | None = None
        self._bound_rows = 0  # of the tensors of graphs, those that may differ from neutral

    def load(self, token_budgets: np.ndarray | None, in_force: int) -> None:
        """Put the budgets (T,) of a forward's tokens in force; None leaves them all alike."""
        self._of_large = None
        if token_budgets is not None:
            self._store(token_budgets, in_force)
        elif self._bound_rows:
            floors, ceilings = self._of_graphs
            floors[: self._bound_rows].zero_()
            ceilings[: self._bound_rows].fill_(self._top_k)
            self._bound_rows = 0

    def of(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return floors and ceilings, int32, of a batch of so many rows.

        Raises UnsupportedServerError for a larger batch that is being captured: the graph would go
        on to read memory that the next forward gives away.
        """
        if num_rows <= GRAPH_ROWS:
            return self._of_graphs
        if is_capturing(self._device):
            raise UnsupportedServerError(
                f"a CUDA graph of {num_rows} rows is captured, and budgets of requests reach "
                f"graphs of at most {GRAPH_ROWS}: capture smaller batches of prefill "
                "(--cuda-graph-max-bs-prefill)"
            )
        if self._of_large is None or len(self._of_large[0]) < num_rows:
            self._of_large = self._neutral(num_rows)
        return self._of_large

    def _store(self, token_budgets: np.ndarray, in_force: int) -> None:
        """Write the rows of these tokens, and neutral ones behind them where others were bound."""
        num_tokens = len(token_budgets)
        targets = self.of(num_tokens)
        num_rows = num_tokens
        if targets is self._of_graphs:
            num_rows, self._bound_rows = max(num_tokens, self._bound_rows), num_tokens
        floors = np.zeros(num_rows, np.int32)
        ceilings = np.full(num_rows, self._top_k, np.int32)
        tokens = slice(num_tokens)
        higher, lower = token_budgets > in_force, token_budgets < in_force
        floors[tokens][higher] = -(-token_budgets[higher] // self._num_layers)
        floors[tokens][token_budgets == self._full] = self._top_k
        ceilings[tokens][lower] = np.maximum(token_budgets[lower] // self._num_layers, 1)
        for target, values in zip(targets, (floors, ceilings), strict=True):
            source = torch.from_numpy(values)
            if self._device.type == "cuda":
                source = source.pin_memory()
            target[:num_rows].copy_(source, non_blocking=True)

    def _neutral(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        floors = torch.zeros(num_rows, dtype=torch.int32, device=self._device)
        return floors, torch.full_like(floors, self._top_k)


def is_capturing(device: torch.device) -> bool:
    """Return whether what runs now is recorded into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
