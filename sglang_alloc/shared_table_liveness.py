"""Data story, seen from outside: whether the rank that wrote a worker slot is still there."""

from pathlib import Path

from sglang_alloc.shared_table_words import WorkerCounters

_RECENT_NS = 10 * 1_000_000_000


def steps_now(worker: WorkerCounters, now_ns: int) -> bool:
    """Tell whether the rank has stepped within ten seconds; `now_ns` is monotonic."""
    return now_ns - worker.last_step_ns < _RECENT_NS


def is_alive(worker: WorkerCounters, now_ns: int) -> bool:
    """Tell whether the rank steps now, or its process lives as seen from here.

    From another container a pid cannot be seen: an idle rank counts as gone there until its next
    step, and one that is gone as alive if another process has its pid.
    """
    return steps_now(worker, now_ns) or process_lives(worker.pid)


def process_lives(pid: int) -> bool:
    """Tell whether there is a process with this pid in this container."""
    return Path(f"/proc/{pid}").is_dir()
