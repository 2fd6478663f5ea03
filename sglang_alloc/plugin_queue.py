"""Data story, beside step 7: how many requests wait behind the batch that a scheduler runs."""

from __future__ import annotations

from typing import Any


def requests_waiting(scheduler: Any) -> int:
    """Return how many requests wait for a place in a batch, once the next batch has been formed.

    On a server that prefills for others (`--disaggregation-mode prefill`) those are the ones whose
    receiver is ready; on one that decodes for others also those that wait for memory to receive
    their prompt's cache, which SGLang keeps in a queue of their own. Nobody is counted whose prompt
    is on its way from the other server: no step of this one would make it faster.
    """
    waiting = len(scheduler.waiting_queue)
    without_memory = scheduler.disagg_decode_prealloc_queue
    if without_memory is not None:
        waiting += len(without_memory.retracted_queue)
        waiting += sum(one.waiting_for_input for one in without_memory.queue)
    return waiting
