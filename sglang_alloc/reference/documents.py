"""Reference model, data: find and read the documents of each domain on this machine."""

import ast
import gzip
import hashlib
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from sglang_alloc.reference.roff import roff_to_text

DOMAINS = ("code", "docs", "man")
DOCUMENT_BYTES_MIN, DOCUMENT_BYTES_MAX = 400, 65_536
FAMILY_DOCUMENTS_MAX = 150  # one program's hundreds of generated pages must not fill a domain
_OWN_PACKAGE = "sglang_alloc"
# Other roots' files, tests (half of the standard library) and generated character tables.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
_LICENCE_FILE = re.compile(r"licen[cs]e|copying|copyright|notice|authors", re.IGNORECASE)
_LICENCES = {
    "MIT": re.compile(r"Permission is hereby granted, free of charge|\bMIT\b.{0,12}Licen[cs]e|"
                      r"^License(-Expression)?: MIT\b", re.MULTILINE),
    "Apache-2.0": re.compile(r"Licensed under the Apache License|Apache[- ]2\.0|Apache Software"),
    "BSD": re.compile(r"Redistribution and use in source and binary forms|\bBSD[- ](2|3)\b|OSI "
                      r"Approved :: BSD|^License(-Expression)?: (new )?BSD", re.MULTILINE),
}  # fmt: skip


class Document(NamedTuple):
    """One text: `origin` is a root's label and the path below it, never a machine's own path."""

    domain: str
    origin: str
    text: str
    licence: str  # SPDX-like name when the document itself grants a permissive licence, else ""
    copyright: str = ""  # the document's own copyright lines

    @property
    def digest(self) -> str:
        """SHA-256 of the text: it decides the split, so a text is on the same side everywhere."""
        return hashlib.sha256(self.text.encode()).hexdigest()


class Source(NamedTuple):
    """Where a domain's files lie, which of them count, and how one becomes text."""

    domain: str
    label: str
    root: Path
    patterns: tuple[str, ...]
    to_texts: Callable[[Path, str], list[str]]


def standard_sources() -> list[Source]:
    """Sources that a Debian machine with Python has; on slim images some roots are empty."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    packages = Path(sysconfig.get_path("purelib"))
    prose = ("**/*.md", "**/*.rst", "**/*.txt", "**/README.gz", "**/*.rst.gz", "**/*.md.gz")
    return [
        Source("code", "stdlib", stdlib, ("**/*.py",), lambda _path, text: [text]),
        Source("docs", "stdlib", stdlib, ("pydoc_data/topics.py",), _topics),
        Source("docs", "site-packages", packages, ("*/METADATA", *prose), _prose),
        Source("docs", "doc", Path("/usr/share/doc"), prose, _prose),
        Source("man", "man", Path("/usr/share/man"), ("man[1-8]/*",), _manual),
    ]


def read_documents(sources: list[Source]) -> list[Document]:
    """Read every usable document, in a fixed order: by domain, then origin."""
    found = [document for source in sources for document in _read_source(source)]
    return sorted(_limit_families(found), key=lambda d: (d.domain, d.origin, d.digest))


def _read_source(source: Source) -> Iterator[Document]:
    paths = {path for pattern in source.patterns for path in source.root.glob(pattern)}
    for path in sorted(paths):
        relative = path.relative_to(source.root)
        if not _counts(source, relative) or path.is_symlink() or not path.is_file():
            continue
        raw = _decode(path)
        licence = "PSF-2.0" if source.label == "stdlib" else permissive_licence(raw)
        for text in source.to_texts(path, raw):
            if len(text) >= DOCUMENT_BYTES_MIN and _mostly_ascii(text):
                origin = f"{source.label}/{relative.as_posix()}"
                kept = text[:DOCUMENT_BYTES_MAX]
                yield Document(source.domain, origin, kept, licence, copyright_lines(raw))


def _counts(source: Source, relative: Path) -> bool:
    if source.domain == "docs" and _LICENCE_FILE.search(relative.as_posix()):
        return False
    if source.label == "site-packages":
        return not relative.parts[0].startswith(_OWN_PACKAGE)
    return source.label != "stdlib" or not _SKIPPED_FOLDERS.intersection(relative.parts)


def _decode(path: Path) -> str:
    """Text of a plain or gzipped UTF-8 file; "" when it is neither."""
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError):
        return ""


def _mostly_ascii(text: str) -> bool:
    return sum(map(str.isascii, text)) >= 0.99 * len(text)


def _topics(_path: Path, text: str) -> list[str]:
    """The language reference chapters that `help()` shows: string values of one dict literal."""
    values = [n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant)]
    return [v for v in values if isinstance(v, str)]


def _prose(path: Path, text: str) -> list[str]:
    """A package's description without its metadata headers, or the document as it is."""
    return [text.partition("\n\n")[2] if path.name == "METADATA" else text]


def _manual(_path: Path, text: str) -> list[str]:
    return [roff_to_text(text)]


def permissive_licence(raw: str) -> str:
    """Name the permissive licence that a document states about itself, or ""."""
    head = raw[:6_000] + raw[-2_000:]
    if re.search(r"GNU (Lesser |Affero |Free )?\w* ?(General Public|Documentation)|GPL", head):
        return ""
    return next((name for name, pattern in _LICENCES.items() if pattern.search(head)), "")


def copyright_lines(raw: str) -> str:
    """The first lines in which a document names its copyright holders, on one line."""
    lines = re.findall(r"Copyright\b[^\n]*\d{4}[^\n]*", raw)
    return "; ".join(" ".join(line.split()) for line in dict.fromkeys(lines[:3]))


def _limit_families(documents: list[Document]) -> Iterator[Document]:
    """Keep at most FAMILY_DOCUMENTS_MAX per name prefix (`git-add.1` and `git-rm.1` share one)."""
    counts: dict[tuple[str, str], int] = {}
    for document in sorted(documents, key=lambda d: d.digest):
        family = document.domain, re.split(r"[-_.:]", document.origin.rsplit("/", 1)[-1])[0]
        counts[family] = counts.get(family, 0) + 1
        if document.domain != "man" or counts[family] <= FAMILY_DOCUMENTS_MAX:
            yield document
