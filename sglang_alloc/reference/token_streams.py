"""Reference model, data: the corpus as tokens, frozen in a file for as long as a run lasts."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sglang_alloc.npz_file import read_npz, write_npz
from sglang_alloc.reference.corpus import Corpus, Manifest, summary, tokens_of
from sglang_alloc.reference.documents import Document

Streams = dict[str, NDArray[np.int16]]


class TokenStreams(NamedTuple):
    """Each domain's text to train on and to measure on, as tokens; `manifest` counts it."""

    train: Streams
    heldout: Streams
    manifest: Manifest


def streams_of(corpus: Corpus) -> TokenStreams:
    """Concatenate the documents of each domain and split."""
    train, heldout = (
        {domain: tokens_of(documents) for domain, documents in corpus.documents[split].items()}
        for split in ("train", "heldout")
    )
    return TokenStreams(train, heldout, corpus.manifest)


def with_domain(
    streams: TokenStreams, domain: str, train: list[Document], heldout: list[Document]
) -> TokenStreams:
    """Add a domain to streams that have been cut from a corpus."""
    return TokenStreams(
        streams.train | {domain: tokens_of(train)},
        streams.heldout | {domain: tokens_of(heldout)},
        streams.manifest | {domain: {"train": summary(train), "heldout": summary(heldout)}},
    )


def save_streams(path: Path, streams: TokenStreams) -> None:
    """Write the streams, so that packages installed during a run do not change its text."""
    arrays: dict[str, Any] = {
        f"{split}/{domain}": tokens
        for split, part in (("train", streams.train), ("heldout", streams.heldout))
        for domain, tokens in part.items()
    }
    manifest = np.str_(json.dumps(streams.manifest))
    write_npz(path, {"manifest": manifest, **arrays}, "token streams")


def load_streams(path: Path) -> TokenStreams:
    """Read what `save_streams` wrote."""
    arrays = read_npz(path, "token streams")
    parts: dict[str, Streams] = {"train": {}, "heldout": {}}
    for name, tokens in arrays.items():
        split, _, domain = name.partition("/")
        if domain:
            parts[split][domain] = tokens
    return TokenStreams(parts["train"], parts["heldout"], json.loads(str(arrays["manifest"])))
