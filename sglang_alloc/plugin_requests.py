"""Data story, beside step 7: which of a scheduler's requests have a budget of their own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from sglang_alloc.errors import RequestBudgetError
from sglang_alloc.request_budget import (
    OwnBudget,
    OwnBudgets,
    RequestRules,
    asked_budget,
    with_floor,
)

logger = logging.getLogger("sglang_alloc")

_OF_BATCH = "sglang_alloc_own_budgets"  # an attribute that travels with a forward's batch


class RequestBudgets:
    """Own budgets by the engine's request object, forgotten with it."""

    def __init__(self, rules: RequestRules, on_ignored: Callable[[], None]) -> None:
        self.rules = rules
        self._on_ignored = on_ignored
        self._ignores_verifies = False
        self._of: WeakKeyDictionary[Any, OwnBudget] = WeakKeyDictionary()

    def admit(self, request: Any) -> None:
        """Note what a new request asks for, and what its priority has at least.

        What cannot be granted is counted and left out.

        Servers refuse such a request before it comes here, unless it came on a way of its own.
        """
        try:
            own = asked_budget(request.sampling_params.custom_params, self.rules)
        except RequestBudgetError as error:
            self._on_ignored()
            logger.warning("sglang-alloc serves a request without its own budget: %s", error)
            own = None
        own = with_floor(own, request.priority, self.rules)
        if own is not None and own != (self.rules.budget_min, self.rules.budget_max):
            self._of[request] = own

    def attach(self, forward_batch: Any, requests: list[Any]) -> None:
        """Let a batch carry its requests' own budgets, if there are any."""
        if not self._of:
            return
        of_requests = [self._of.get(request) for request in requests]
        if any(own is not None for own in of_requests):
            setattr(forward_batch, _OF_BATCH, of_requests)

    def of_forward(self, forward_batch: Any) -> OwnBudgets | None:
        """Return what `attach` noted, with the number of tokens of each request.

        Where nobody tells whose a verified draft's tokens are, the forward's own budgets are
        counted as ignored: it is served at the budget in force.
        """
        of_requests = getattr(forward_batch, _OF_BATCH, None)
        if of_requests is None:
            return None
        if forward_batch.forward_mode.is_target_verify():
            return self._of_verify(forward_batch, of_requests)
        if forward_batch.forward_mode.is_extend():
            return OwnBudgets(of_requests, forward_batch.extend_seq_lens_cpu)
        return OwnBudgets(of_requests, [1] * len(of_requests))

    def _of_verify(
        self, forward_batch: Any, of_requests: list[OwnBudget | None]
    ) -> OwnBudgets | None:
        """Divide the tokens by the requests, unless SGLang packs drafts of unequal lengths."""
        each, rest = divmod(len(forward_batch.input_ids), len(of_requests))
        layout = getattr(forward_batch.spec_info, "ragged_verify_layout", None)
        if layout is None and rest == 0:
            return OwnBudgets(of_requests, [each] * len(of_requests))
        self._on_ignored()
        if not self._ignores_verifies:
            self._ignores_verifies = True
            logger.warning(
                "sglang-alloc serves requests with budgets of their own at the budget in force "
                "where drafts of unequal lengths are verified (SGLANG_RAGGED_VERIFY_MODE)"
            )
        return None
