"""Reference model, data: the held-out and calibration text that the repository carries."""

import hashlib
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sglang_alloc.reference.corpus import Corpus, build_corpus, tokens_of
from sglang_alloc.reference.documents import DOMAINS, Document, read_documents, standard_sources

SAMPLES = Path(__file__).parent / "samples"
SAMPLE_BYTES_MAX = 98_304
EXCERPT_CHARS = 8_192  # a piece of many documents says more than the whole of a few
SEPARATOR = "\f\n"


def sample_documents(documents: list[Document]) -> list[Document]:
    """Excerpts of the permissively licensed documents, SAMPLE_BYTES_MAX at most, in hash order."""
    chosen: list[Document] = []
    size = 0
    for document in sorted(documents, key=lambda d: hashlib.sha256(d.text.encode()).digest()):
        excerpt = document.text[:EXCERPT_CHARS].replace("\f", "")
        size += len(excerpt.encode())
        if size > SAMPLE_BYTES_MAX:
            break
        chosen.append(document._replace(text=excerpt))
    return chosen


def write_samples(corpus: Corpus, folder: Path = SAMPLES) -> None:
    """Write one text per split and domain, and ORIGINS.json with each excerpt's terms."""
    folder.mkdir(parents=True, exist_ok=True)
    origins = {}
    for split in ("heldout", "calibration"):
        for domain in corpus.domains:
            licensed = [d for d in corpus.documents[split][domain] if d.licence]
            chosen = sample_documents(licensed)
            name = f"{split}_{domain}.txt"
            (folder / name).write_text(SEPARATOR.join(d.text for d in chosen))
            origins[name] = [
                {"origin": d.origin, "licence": d.licence, "copyright": d.copyright,
                 "characters": len(d.text)}
                for d in chosen
            ]  # fmt: skip
    (folder / "ORIGINS.json").write_text(json.dumps(origins, indent=1) + "\n")


def read_sample(split: str, folder: Path = SAMPLES) -> dict[str, NDArray[np.int16]]:
    """Tokens of each domain's sample of `split`, "heldout" or "calibration"."""
    paths = {domain: folder / f"{split}_{domain}.txt" for domain in DOMAINS}
    return {d: _tokens(path) for d, path in paths.items() if path.exists()}


def read_all_samples(folder: Path = SAMPLES) -> list[str]:
    """Every committed excerpt, which training must not see."""
    return [text for path in sorted(folder.glob("*_*.txt")) for text in _excerpts(path)]


def _excerpts(path: Path) -> list[str]:
    return path.read_text().split(SEPARATOR)


def _tokens(path: Path) -> NDArray[np.int16]:
    return tokens_of(Document("", path.name, text, "") for text in _excerpts(path))


def main() -> None:
    """Rewrite the committed samples from this machine's text."""
    write_samples(build_corpus(read_documents(standard_sources())))


if __name__ == "__main__":
    main()
