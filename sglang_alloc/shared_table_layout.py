"""Contract 1, byte by byte: the file that the data story reads and the control story writes.

Everything is little-endian. Pages are 4096 bytes, cache lines 64.

    page 0    header, never changed after publication
      0       magic b"SGLALLOC"             8 bytes } these twelve bytes keep their place in every
      8       layout version                u32     } later version
      12      CRC-32 of page 0, taken with this field zero   u32
      16      file size in bytes            u64
      24      L MoE layers, K top-k, E experts, N budgets, smallest budget, full budget   6 x u32
      48      model fingerprint             32 bytes
      80      SHA-256 of the payload        32 bytes
      112     publication id                16 random bytes
      128     number of sections            u32, then 4 zero bytes
      136     time of publication           u64, nanoseconds of wall clock
      144     model id                      256 bytes of UTF-8, zero-padded
      400     note on the modes it serves   112 bytes of UTF-8, zero-padded
      512     section directory             up to 32 entries of 64 bytes:
              name 24, dtype 8, rows u64, columns u64 (0: one dimension), offset u64, size u64
    page 1    control words
      4096    line of the selector's one writer: selector, heartbeat (monotonic ns), writer epoch,
              writer pid, calm word         5 x u64
      4160    line of the override: word, deadline (monotonic ns, 0: none), check   3 x u64
      4224    line of the override's actor  64 bytes of UTF-8, zero-padded
      6144    64 x 4 u64 (`CalmTokens`), those of rank r written by it alone, with its slot
    pages 2-3 64 worker slots of 16 u64 words (`WorkerCounters`), slot r written by rank r alone
    16384     payload: the sections, each at a multiple of 64, never changed after publication

The selector is one word, so a change of budget is one aligned 8-byte store:

    bits 63..32 generation   bits 31..16 prefill budget   bits 15..0 decode budget

A budget counts routed-expert activations per token over all MoE layers. Its row in the payload is
`budget - smallest budget`.

The calm word holds the budgets of calm steps, which leave no request waiting and before which
fewer than R requests run; the selector's are then those of all other steps:

    bits 63..48 the selector's generation mod 2**16   bits 47..32 R, 65535: any number
    bits 31..16 calm prefill budget                   bits 15..0  calm decode budget

It counts only while its generation is the selector's, its budgets have rows and neither is below
the selector's. Otherwise, as with a writer that knows no calm word, the selector's budgets hold
always; a worker that knows none reads the selector alone. So both may be older than the other.

Ordering rules, which hold on x86-64 and on AArch64 because none of them needs a fence:

1. Every mutable value is an aligned u64 and is read and written whole: no torn budget exists.
2. The payload is complete, flushed and renamed into place before anyone can open it, and never
   changes: a selector can only name a complete row. Publishing again makes another file.
3. A reader decides from the selector alone. The heartbeat only tells whether the writer lives; it
   may be seen before or after the selector that was written with it.
4. Generations start at 1, grow by 1 with each change and wrap from 2**32 - 1 to 1; 0 means never.
   b is newer than a when 0 < (b - a) mod 2**32 < 2**31. One writer at a time (an flock on
   `<path>.lock`, told apart by its epoch) keeps them in order, and a new writer continues them.
5. The override spans several words, so its check word is word ^ deadline ^ CRC-32 of the actor. A
   reader that sees any mixture of an old and a new override finds the check wrong and takes
   neither; a setter killed half-way leaves none in force. Setters exclude each other by an flock
   on the file itself.
6. The words of a worker slot are each whole but are not taken at one instant; `pid` comes last.
7. The writer stores the calm word before the selector of the same generation. A reader may see
   either first: between the two stores the generations differ, and it uses the selector's budgets
   alone. So what it remembers of the two goes by both words: the selector is not stored again when
   the calm word comes into sight after it.
8. Nobody may shorten or rewrite the file in place, as `cp` over it does: publish instead. Touching
   a mapped page beyond the end kills a process, so whoever must not die asks for the file's size
   and for the publication id in its mapping before it touches anything else.
"""

import struct
import zlib
from typing import NamedTuple

MAGIC = b"SGLALLOC"
LAYOUT_VERSION = 1

PAGE_BYTES = 4096
WORD_BYTES = 8
MAPPED_BYTES = 4 * PAGE_BYTES
PAYLOAD_OFFSET = MAPPED_BYTES
SECTION_ALIGNMENT_BYTES = 64
MAX_SECTIONS = 32

# Indices of u64 words from the start of the file.
PUBLICATION_WORD = 112 // WORD_BYTES
SELECTOR_WORD = 4096 // WORD_BYTES
HEARTBEAT_WORD = SELECTOR_WORD + 1
WRITER_EPOCH_WORD = SELECTOR_WORD + 2
WRITER_PID_WORD = SELECTOR_WORD + 3
CALM_WORD = SELECTOR_WORD + 4
OVERRIDE_WORD = 4160 // WORD_BYTES
OVERRIDE_DEADLINE_WORD = OVERRIDE_WORD + 1
OVERRIDE_CHECK_WORD = OVERRIDE_WORD + 2
OVERRIDE_ACTOR_OFFSET = 4224
OVERRIDE_ACTOR_BYTES = 64
CALM_TOKENS_WORD = 6144 // WORD_BYTES
CALM_TOKENS_WORDS = 4  # of each rank
WORKER_SLOTS_WORD = 2 * PAGE_BYTES // WORD_BYTES
WORKER_SLOT_WORDS = 16
MAX_WORKERS = 64

_HEADER = struct.Struct("<8sIIQ6I32s32s16sIIQ256s112s")
_ENTRY = struct.Struct("<24s8s4Q")
_VERSION = slice(8, 12)
_CHECKSUM_OFFSET = 12
_DIRECTORY_OFFSET = 512
SECTION_NAME_BYTES = 24
MODE_NOTE_BYTES = 112

assert (CALM_TOKENS_WORD + MAX_WORKERS * CALM_TOKENS_WORDS) * WORD_BYTES <= 2 * PAGE_BYTES
assert _HEADER.size == _DIRECTORY_OFFSET
assert _DIRECTORY_OFFSET + MAX_SECTIONS * _ENTRY.size <= PAGE_BYTES


class TableShape(NamedTuple):
    """The model's numbers that the sections' shapes follow from."""

    num_layers: int
    top_k: int
    num_experts: int
    budget_min: int
    budget_max: int

    @property
    def num_budgets(self) -> int:
        """N, the number of rows: one for each budget."""
        return self.budget_max - self.budget_min + 1


class SectionEntry(NamedTuple):
    """Where one array of the payload lies; `columns` is 0 for an array of one dimension."""

    name: str
    dtype: str
    rows: int
    columns: int
    offset: int
    nbytes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return (self.rows, self.columns) if self.columns else (self.rows,)


class Header(NamedTuple):
    """Page 0, unpacked."""

    file_bytes: int
    shape: TableShape
    fingerprint: bytes
    payload_sha256: bytes
    publication_id: bytes
    published_ns: int
    model_id: str
    mode_note: str
    sections: tuple[SectionEntry, ...]


def pack_header(header: Header) -> bytes:
    """Return page 0 with its checksum; the texts must fit their fields."""
    shape = header.shape
    page = bytearray(PAGE_BYTES)
    _HEADER.pack_into(
        page,
        0,
        MAGIC,
        LAYOUT_VERSION,
        0,
        header.file_bytes,
        shape.num_layers,
        shape.top_k,
        shape.num_experts,
        shape.num_budgets,
        shape.budget_min,
        shape.budget_max,
        header.fingerprint,
        header.payload_sha256,
        header.publication_id,
        len(header.sections),
        0,
        header.published_ns,
        header.model_id.encode(),
        header.mode_note.encode(),
    )
    for index, entry in enumerate(header.sections):
        name, dtype = entry.name.encode(), entry.dtype.encode()
        _ENTRY.pack_into(page, _DIRECTORY_OFFSET + index * _ENTRY.size, name, dtype, *entry[2:])
    struct.pack_into("<I", page, _CHECKSUM_OFFSET, zlib.crc32(page))
    return bytes(page)


def version_of(page: bytes) -> int:
    """Return the layout version of page 0, 0 for a page that ends before it."""
    return int.from_bytes(page[_VERSION], "little")


def header_checksum_holds(page: bytes) -> bool:
    """Tell whether page 0 is what `pack_header` made."""
    (stored,) = struct.unpack_from("<I", page, _CHECKSUM_OFFSET)
    zeroed = page[:_CHECKSUM_OFFSET] + bytes(4) + page[_CHECKSUM_OFFSET + 4 :]
    return bool(stored == zlib.crc32(zeroed))


def unpack_header(page: bytes) -> Header:
    """Read page 0, whose version and checksum have been seen to hold."""
    fields = _HEADER.unpack_from(page)
    num_layers, top_k, num_experts, _, budget_min, budget_max = fields[4:10]
    return Header(
        file_bytes=fields[3],
        shape=TableShape(num_layers, top_k, num_experts, budget_min, budget_max),
        fingerprint=fields[10],
        payload_sha256=fields[11],
        publication_id=fields[12],
        published_ns=fields[15],
        model_id=padded_text(fields[16]),
        mode_note=padded_text(fields[17]),
        sections=tuple(_unpack_entry(page, index) for index in range(fields[13])),
    )


def padded_text(field: bytes) -> str:
    """Return the text of a zero-padded UTF-8 field."""
    return field.split(b"\0", 1)[0].decode(errors="replace")


def _unpack_entry(page: bytes, index: int) -> SectionEntry:
    name, dtype, rows, columns, offset, nbytes = _ENTRY.unpack_from(
        page, _DIRECTORY_OFFSET + index * _ENTRY.size
    )
    return SectionEntry(padded_text(name), padded_text(dtype), rows, columns, offset, nbytes)
