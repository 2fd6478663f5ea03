"""Control story, by hand: the override that a person sets, read without a lock and never torn."""

import zlib

from sglang_alloc import shared_table_layout as layout
from sglang_alloc.shared_table_words import Override, next_generation, pack_word, unpack_word

# No override is longer, so a later deadline was left by another boot.
OVERRIDE_MAX_NS = 24 * 3600 * 1_000_000_000

_ACTOR = slice(
    layout.OVERRIDE_ACTOR_OFFSET, layout.OVERRIDE_ACTOR_OFFSET + layout.OVERRIDE_ACTOR_BYTES
)


def read_override(words: memoryview, octets: memoryview, now_ns: int) -> Override | None:
    """Return the override in force at `now_ns`, or None, also while one is half written.

    `words` and `octets` are the same pages, as u64 and as bytes.
    """
    word, deadline_ns, check = words[layout.OVERRIDE_WORD : layout.OVERRIDE_WORD + 3]
    actor = bytes(octets[_ACTOR])
    if not now_ns < deadline_ns <= now_ns + OVERRIDE_MAX_NS:
        return None
    if check != _check(word, deadline_ns, actor):
        return None
    generation, prefill_budget, decode_budget = unpack_word(word)
    text = layout.padded_text(actor)
    return Override(prefill_budget, decode_budget, generation, deadline_ns, text)


def store_override(
    words: memoryview,
    octets: memoryview,
    budgets: tuple[int, int],
    deadline_ns: int,
    actor: str,
) -> None:
    """Write the override of (prefill, decode) budgets; the caller excludes other setters."""
    generation = next_generation(words[layout.OVERRIDE_WORD] >> 32)
    word = pack_word(generation, *budgets)
    name = _cut_to_bytes(actor, layout.OVERRIDE_ACTOR_BYTES)
    octets[_ACTOR] = name
    words[layout.OVERRIDE_WORD] = word
    words[layout.OVERRIDE_CHECK_WORD] = _check(word, deadline_ns, name)
    words[layout.OVERRIDE_DEADLINE_WORD] = deadline_ns


def _check(word: int, deadline_ns: int, actor: bytes) -> int:
    return word ^ deadline_ns ^ zlib.crc32(actor)


def _cut_to_bytes(text: str, size: int) -> bytes:
    whole = text.encode()[:size].decode(errors="ignore")
    return whole.encode().ljust(size, b"\0")
