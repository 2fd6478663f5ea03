"""Contract 1, where the data and the control story meet: the public names of the shared table.

The byte layout and the ordering rules are the docstring of `shared_table_layout`.
"""

from sglang_alloc.shared_table_layout import TableShape
from sglang_alloc.shared_table_override import OVERRIDE_MAX_NS
from sglang_alloc.shared_table_publish import publish_shared_table
from sglang_alloc.shared_table_reader import SharedTable
from sglang_alloc.shared_table_words import (
    SOURCES,
    CalmBudgets,
    CalmTokens,
    Fallback,
    Override,
    Selection,
    Selector,
    WorkerCounters,
    WorkerSlot,
    calm_of_word,
    is_newer_generation,
    next_generation,
    pack_calm_word,
    pack_word,
    unpack_word,
)
from sglang_alloc.shared_table_writer import SelectorWriter, lock_path

__all__ = [
    "OVERRIDE_MAX_NS",
    "SOURCES",
    "CalmBudgets",
    "CalmTokens",
    "Fallback",
    "Override",
    "Selection",
    "Selector",
    "SelectorWriter",
    "SharedTable",
    "TableShape",
    "WorkerCounters",
    "WorkerSlot",
    "calm_of_word",
    "is_newer_generation",
    "lock_path",
    "next_generation",
    "pack_calm_word",
    "pack_word",
    "publish_shared_table",
    "unpack_word",
]
