"""Reference model, data: split the documents by content hash, drop repeats, record what is used."""

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sglang_alloc.errors import AllocError
from sglang_alloc.reference.documents import DOMAINS, Document
from sglang_alloc.reference.tokenizer import END_OF_TEXT

SPLITS = ("train", "heldout", "calibration")
PARAGRAPH_CHARS_MIN = 160  # shorter repeats ("import sys") are the language, not copies
DOMAIN_BYTES_MIN = 200_000


Manifest = dict[str, dict[str, dict[str, object]]]  # domain, split, then counts and digest


class CorpusError(AllocError):
    """This machine's text does not make a training corpus."""


class Corpus(NamedTuple):
    """Documents per split and domain; `manifest` is what the model's recipe records."""

    documents: dict[str, dict[str, list[Document]]]
    manifest: Manifest

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.documents["train"])


def split_of(document: Document) -> str:
    """Train, held-out or calibration, by the text's hash: 88%, 6% and 6% of the documents."""
    bucket = int(document.digest[:8], 16) % 100
    return "heldout" if bucket < 6 else "calibration" if bucket < 12 else "train"


def paragraphs(text: str) -> list[str]:
    """Blocks of text between blank lines."""
    return text.split("\n\n")


def build_corpus(documents: Iterable[Document], never_train: Iterable[str] = ()) -> Corpus:
    """Split and deduplicate `documents` (in the order given).

    A paragraph of at least PARAGRAPH_CHARS_MIN characters occurs once in the whole corpus, so no
    long passage is on both sides of a split. Paragraphs of `never_train` (the committed samples)
    are dropped from training, wherever this machine's hash puts the document they come from.
    Domains with less than DOMAIN_BYTES_MIN of training text are left out; fewer than two domains
    left raises CorpusError.
    """
    seen: set[bytes] = set()
    samples = {_paragraph_key(p) for text in never_train for p in paragraphs(text)}
    split: dict[str, dict[str, list[Document]]] = {s: {d: [] for d in DOMAINS} for s in SPLITS}
    for document in documents:
        name = split_of(document)
        text = _without_repeats(document.text, seen, samples if name == "train" else set())
        if len(text) >= 200:
            split[name][document.domain].append(document._replace(text=text))
    kept = [d for d in DOMAINS if _bytes_of(split["train"][d]) >= DOMAIN_BYTES_MIN]
    if len(kept) < 2:
        sizes = {d: _bytes_of(split["train"][d]) for d in DOMAINS}
        raise CorpusError(
            f"training needs at least two domains of {DOMAIN_BYTES_MIN} bytes, found {sizes}; "
            "install manual pages (man-db, manpages-dev) or package documentation"
        )
    chosen = {s: {d: split[s][d] for d in kept} for s in SPLITS}
    return Corpus(chosen, {d: {s: summary(chosen[s][d]) for s in SPLITS} for d in kept})


def tokens_of(documents: Iterable[Document]) -> NDArray[np.int16]:
    """Concatenate the documents' bytes, each followed by END_OF_TEXT."""
    pieces = []
    for document in documents:
        pieces.append(np.frombuffer(document.text.encode(), dtype=np.uint8).astype(np.int16))
        pieces.append(np.array([END_OF_TEXT], dtype=np.int16))
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int16)


def _paragraph_key(paragraph: str) -> bytes:
    return hashlib.blake2b(" ".join(paragraph.split()).encode(), digest_size=16).digest()


def _without_repeats(text: str, seen: set[bytes], banned: set[bytes]) -> str:
    """Drop long paragraphs in `seen` or `banned`; add the kept ones to `seen`."""
    kept = []
    for paragraph in paragraphs(text):
        if len(paragraph) >= PARAGRAPH_CHARS_MIN:
            key = _paragraph_key(paragraph)
            if key in seen or key in banned:
                continue
            seen.add(key)
        kept.append(paragraph)
    return "\n\n".join(kept)


def _bytes_of(documents: list[Document]) -> int:
    return sum(len(d.text.encode()) for d in documents)


def summary(documents: list[Document]) -> dict[str, object]:
    """What the model's recipe records of a split: counts, and a digest of its texts."""
    digest = hashlib.sha256("".join(d.digest for d in documents).encode()).hexdigest()
    return {"documents": len(documents), "bytes": _bytes_of(documents), "sha256": digest}
