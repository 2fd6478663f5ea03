"""Data story, beside step 7: how many requests run already, and how many a batch leaves waiting."""

from __future__ import annotations

from typing import Any

from sglang_alloc.worker import Worker


def tell_worker(worker: Worker, scheduler: Any, batch: Any) -> None:
    """Let the forwards of the batch that runs next know whether they belong to a calm step."""
    worker.requests_waiting = requests_waiting(scheduler)
    worker.requests_running = requests_running(scheduler, batch)


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


def requests_running(scheduler: Any, batch: Any) -> int:
    """Return how many requests are past their prefill, whether they are in this batch or not.

    A mixed batch has taken them out of the scheduler's own.
    """
    running = len(scheduler.running_batch.reqs)
    if batch.forward_mode.is_mixed():
        running += len(batch.decoding_reqs or ())
    return running
