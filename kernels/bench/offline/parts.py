"""Bundle, step 3: one tar file in parts below a size limit, each with its checksum."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

_CHUNK = 1 << 20
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1024, "mi": 1024**2, "gi": 1024**3}


def parse_size(text: str) -> int:
    """Return the bytes that `90M`, `1.5G` or `512Ki` mean; raise ValueError otherwise."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", text.strip().lower())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise ValueError(f"{text!r} is not a size: give one like 90M, 1.5G or 512Ki")
    return size


def split_file(source: Path, part_bytes: int) -> list[Path]:
    """Split a file into `NAME.part000`, ... beside it, none above `part_bytes`; remove the file.

    A file that fits is one part, so that a reader needs one command in any case.
    """
    parts: list[Path] = []
    with source.open("rb") as stream:
        while True:
            part = source.with_name(f"{source.name}.part{len(parts):03d}")
            if not _write_part(stream, part, part_bytes):
                part.unlink()
                break
            parts.append(part)
    source.unlink()
    return parts


def _write_part(stream: object, part: Path, part_bytes: int) -> int:
    written = 0
    with part.open("wb") as file:
        while written < part_bytes:
            chunk = stream.read(min(_CHUNK, part_bytes - written))  # type: ignore[attr-defined]
            if not chunk:
                break
            file.write(chunk)
            written += len(chunk)
    return written


def checksums(files: list[Path]) -> str:
    """Return lines as `sha256sum -c` reads them."""
    return "".join(f"{_sha256(file)}  {file.name}\n" for file in files)


def _sha256(file: Path) -> str:
    state = hashlib.sha256()
    for chunk in _chunks(file):
        state.update(chunk)
    return state.hexdigest()


def _chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            yield chunk
