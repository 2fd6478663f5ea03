"""Offline story, last step: put the budget tables where the server and the controller meet."""

import hashlib
import os
import time
from pathlib import Path

from sglang_alloc import shared_table_layout as layout
from sglang_alloc.atomic_file import replace_file
from sglang_alloc.budget_tables import ARRAYS, BudgetTables
from sglang_alloc.errors import SharedTableError, TableFormatError
from sglang_alloc.shared_table_words import BUDGET_LIMIT, pack_word

# Server, controller and operator share a user or a group: each of them writes words of its own.
# Nobody else may move the budget, and there is nothing for others to read.
_FILE_MODE = 0o660
# Sensitivities are the offline path's own; the layer ids come last.
_UNPUBLISHED = frozenset({"layer_ids", "budgets", "sensitivity", "prefill_sensitivity"})
_SECTIONS = (*(name for name in ARRAYS if name not in _UNPUBLISHED), "layer_ids")


def publish_shared_table(path: Path, tables: BudgetTables, *, mode_note: str = "") -> None:
    """Write `tables` to `path` in one step, at full budget, generation 1 and without a heartbeat.

    A server or controller that has an earlier publication open keeps that one; see
    `SharedTable.is_current`. `mode_note` (at most 112 bytes) names the one mode
    that it is served in, or is empty: see `allocation_mode`.

    Raises:
        TableFormatError: `tables` break their format, or are too large for the selector.
        SharedTableError: the folder cannot be created or written, or has no room.
    """
    tables.validate()
    content = _content(tables, mode_note)
    try:
        replace_file(path, content, mode=_FILE_MODE)
    except OSError as error:
        raise SharedTableError(
            f"Cannot publish a shared table of {len(content)} bytes at {path}: "
            f"{error.strerror or error} (uid {os.geteuid()}, folder {path.parent}). Choose a path "
            "in a folder that this user may write to and that has room."
        ) from error


def _content(tables: BudgetTables, mode_note: str) -> bytes:
    shape = layout.TableShape(
        tables.num_layers, tables.top_k, tables.num_experts, tables.budget_min, tables.budget_max
    )
    if shape.budget_max > BUDGET_LIMIT:
        raise TableFormatError(
            f"budgets: expected at most {BUDGET_LIMIT}, what the selector's 16 bits hold, found "
            f"{shape.budget_max}."
        )
    if len(mode_note.encode()) > layout.MODE_NOTE_BYTES:
        raise TableFormatError(
            f"mode_note: expected at most {layout.MODE_NOTE_BYTES} bytes of UTF-8, found "
            f"{len(mode_note.encode())}."
        )
    entries, payload = _payload(tables)
    header = layout.Header(
        file_bytes=layout.PAYLOAD_OFFSET + len(payload),
        shape=shape,
        fingerprint=bytes.fromhex(tables.fingerprint),
        payload_sha256=hashlib.sha256(payload).digest(),
        publication_id=os.urandom(16),
        published_ns=time.time_ns(),
        model_id=tables.model_id,
        mode_note=mode_note,
        sections=entries,
    )
    return layout.pack_header(header) + _control_pages(shape.budget_max) + payload


def _payload(tables: BudgetTables) -> tuple[tuple[layout.SectionEntry, ...], bytes]:
    arrays = tables.arrays()
    entries, payload = [], bytearray()
    for name in _SECTIONS:
        if name not in arrays:
            continue
        array = arrays[name]
        assert len(name) <= layout.SECTION_NAME_BYTES
        rows, columns = array.shape if array.ndim == 2 else (array.shape[0], 0)
        offset = layout.PAYLOAD_OFFSET + len(payload)
        entries.append(
            layout.SectionEntry(name, array.dtype.str, rows, columns, offset, array.nbytes)
        )
        payload += array.tobytes()
        payload += bytes(-len(payload) % layout.SECTION_ALIGNMENT_BYTES)
    return tuple(entries), bytes(payload)


def _control_pages(full_budget: int) -> bytes:
    pages = bytearray(layout.MAPPED_BYTES - layout.PAGE_BYTES)
    selector = pack_word(1, full_budget, full_budget).to_bytes(layout.WORD_BYTES, "little")
    start = layout.SELECTOR_WORD * layout.WORD_BYTES - layout.PAGE_BYTES
    pages[start : start + layout.WORD_BYTES] = selector
    return bytes(pages)
