"""Data story, before the first step: is this file the table that it claims to be?"""

import hashlib
import mmap
import os
import stat
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from sglang_alloc import shared_table_layout as layout
from sglang_alloc.budget_tables import ARRAYS
from sglang_alloc.errors import SharedTableError

REQUIRED_SECTIONS = ("quotas", "predicted_loss", "layer_ids")
_REPUBLISH = "Publish it again with `sglang-alloc publish`."


def open_checked(path: Path, *, writable: bool) -> tuple[int, layout.Header, bytes]:
    """Open `path` and return its descriptor, which the caller owns, its header and its payload.

    Nothing is mapped before the size is known to be what the header says, because touching a
    mapped page beyond the end of a file kills the process.

    Raises:
        SharedTableError: see `SharedTable.open`.
    """
    if sys.byteorder != "little":
        raise SharedTableError(
            f"The shared table {path} is little-endian and this machine is big-endian. Run "
            "sglang-alloc on a little-endian machine."
        )
    descriptor = _open(path, writable=writable)
    try:
        header = _read_header(path, descriptor)
        payload = _read_payload(path, descriptor, header)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, header, payload


def map_words(path: Path, descriptor: int, *, writable: bool) -> mmap.mmap:
    """Map pages 0 to 3 of a checked file; closes `descriptor` if that fails.

    Raises:
        SharedTableError: the file system does not allow it.
    """
    access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
    try:
        return mmap.mmap(descriptor, layout.MAPPED_BYTES, access=access)
    except OSError as error:
        os.close(descriptor)
        raise SharedTableError(
            f"Cannot map the shared table {path}: {error.strerror}. Put it on a file system "
            "that allows shared mappings, such as /dev/shm."
        ) from error


def section_array(header: layout.Header, payload: bytes, name: str) -> npt.NDArray[Any] | None:
    """Return the read-only view of section `name` in `payload`, None if there is none."""
    for entry in header.sections:
        if entry.name == name:
            flat: npt.NDArray[Any] = np.frombuffer(
                payload,
                dtype=entry.dtype,
                count=entry.nbytes // np.dtype(entry.dtype).itemsize,
                offset=entry.offset - layout.PAYLOAD_OFFSET,
            )
            return flat.reshape(entry.shape)
    return None


def _open(path: Path, *, writable: bool) -> int:
    flags = os.O_CLOEXEC | (os.O_RDWR if writable else os.O_RDONLY)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError as error:
        raise SharedTableError(
            f"There is no shared table at {path}. Publish one with `sglang-alloc publish`, or "
            "check the path that the server and the controller were given."
        ) from error
    except PermissionError as error:
        purpose = "write to" if writable else "read"
        raise SharedTableError(
            f"This user (uid {os.geteuid()}) may not {purpose} the shared table {path}. Run as "
            "the user who published it or in the file's group."
        ) from error
    except OSError as error:
        raise SharedTableError(
            f"Cannot open the shared table {path}: {error.strerror}. Give the path of a file."
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise SharedTableError(f"{path} is not a file, so it cannot be a shared table.")
    return descriptor


def _read_header(path: Path, descriptor: int) -> layout.Header:
    page = os.pread(descriptor, layout.PAGE_BYTES, 0)
    found_bytes = os.fstat(descriptor).st_size
    version = layout.version_of(page)
    if not layout.MAGIC.startswith(page[: len(layout.MAGIC)]):
        raise SharedTableError(
            f"{path} is not a shared table: it begins with {page[:8]!r}, not {layout.MAGIC!r}. "
            "Check the path; this file is left as it is."
        )
    if len(page) < layout.PAGE_BYTES:
        _truncated(path, found_bytes, f"at least {layout.MAPPED_BYTES}")
    if version != layout.LAYOUT_VERSION:
        raise SharedTableError(
            f"The shared table {path} has layout version {version}, and this sglang-alloc reads "
            f"version {layout.LAYOUT_VERSION}. Use the same sglang-alloc for the server, the "
            "controller and the command line, and publish again."
        )
    if not layout.header_checksum_holds(page):
        _corrupt(path, "its header does not match its checksum")
    header = layout.unpack_header(page)
    if found_bytes < header.file_bytes or found_bytes < layout.MAPPED_BYTES:
        _truncated(path, found_bytes, str(header.file_bytes))
    if found_bytes > header.file_bytes:
        _corrupt(path, f"it has {found_bytes} bytes where its header says {header.file_bytes}")
    _check_directory(path, header)
    return header


def _read_payload(path: Path, descriptor: int, header: layout.Header) -> bytes:
    wanted_bytes = header.file_bytes - layout.PAYLOAD_OFFSET
    payload = os.pread(descriptor, wanted_bytes, layout.PAYLOAD_OFFSET)
    if len(payload) < wanted_bytes:
        _truncated(path, layout.PAYLOAD_OFFSET + len(payload), str(header.file_bytes))
    if hashlib.sha256(payload).digest() != header.payload_sha256:
        _corrupt(path, "its tables do not match their checksum")
    return payload


def _check_directory(path: Path, header: layout.Header) -> None:
    shape = header.shape
    sizes = {
        "L": shape.num_layers,
        "K": shape.top_k,
        "N": shape.num_budgets,
        "E": shape.num_experts,
    }
    for entry in header.sections:
        known = ARRAYS.get(entry.name)
        if known is None:
            continue
        dtype, letters = known
        expected = (dtype, tuple(sizes[letter] for letter in letters))
        nbytes = int(np.prod(expected[1])) * np.dtype(dtype).itemsize
        inside = layout.PAYLOAD_OFFSET <= entry.offset <= header.file_bytes - nbytes
        if (entry.dtype, entry.shape) != expected or entry.nbytes != nbytes or not inside:
            _corrupt(path, f"its section {entry.name} is {entry}, not {expected}")
    present = {entry.name for entry in header.sections}
    missing = [name for name in REQUIRED_SECTIONS if name not in present]
    if missing:
        _corrupt(path, f"it lacks the section {', '.join(missing)}")


def _truncated(path: Path, found_bytes: int, expected_bytes: str) -> NoReturn:
    raise SharedTableError(
        f"The shared table {path} is truncated: {found_bytes} bytes, expected {expected_bytes}. "
        + _REPUBLISH
    )


def _corrupt(path: Path, reason: str) -> NoReturn:
    raise SharedTableError(f"The shared table {path} is corrupt: {reason}. {_REPUBLISH}")
