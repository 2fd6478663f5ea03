"""The reference model's text: found anywhere, split by content, never on both sides."""

import gzip
from pathlib import Path

import pytest
from reference_factory import make_documents

from sglang_alloc.reference.corpus import (
    CorpusError,
    build_corpus,
    paragraphs,
    split_of,
    tokens_of,
)
from sglang_alloc.reference.documents import Source, permissive_licence, read_documents
from sglang_alloc.reference.roff import roff_to_text
from sglang_alloc.reference.samples import read_all_samples, read_sample, write_samples
from sglang_alloc.reference.tokenizer import END_OF_TEXT


def _two_domains() -> list:
    return make_documents(domain="code") + make_documents(domain="man")


def test_split_is_the_same_for_the_same_text_under_any_name() -> None:
    document = make_documents(1)[0]
    assert split_of(document) == split_of(document._replace(origin="elsewhere", licence=""))


def test_corpus_is_the_same_every_time() -> None:
    assert build_corpus(_two_domains()) == build_corpus(_two_domains())


def test_no_long_paragraph_is_on_two_sides_of_the_split() -> None:
    documents = _two_domains()
    shared = "A licence paragraph that every document repeats word by word. " * 5
    repeated = [d._replace(text=f"{shared}\n\n{d.text}") for d in documents]
    corpus = build_corpus(repeated)
    sides = [
        {p for documents in split.values() for d in documents for p in paragraphs(d.text)}
        for split in corpus.documents.values()
    ]
    assert all(sides)
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]
    assert sum(shared in side for side in sides) <= 1


def test_committed_samples_never_reach_training() -> None:
    documents = _two_domains()
    trained = build_corpus(documents).documents["train"]["code"][0]
    again = build_corpus(documents, never_train=[trained.text])
    texts = "".join(d.text for d in again.documents["train"]["code"])
    assert paragraphs(trained.text)[0] not in texts


def test_domain_with_too_little_text_is_left_out() -> None:
    corpus = build_corpus(_two_domains() + make_documents(3, domain="docs"))
    assert corpus.domains == ("code", "man")
    assert set(corpus.manifest) == {"code", "man"}


def test_machine_without_text_is_refused_with_advice() -> None:
    with pytest.raises(CorpusError, match="manpages-dev"):
        build_corpus(make_documents(3))


def test_every_document_ends_with_the_end_of_text_token() -> None:
    first, second = make_documents(2)
    tokens = tokens_of([first, second])
    assert (tokens == END_OF_TEXT).sum() == 2
    assert bytes(tokens[: len(first.text)].astype("uint8")).decode() == first.text


def test_origins_name_no_machine_path(tmp_path: Path) -> None:
    page = tmp_path / "man1" / "tool.1.gz"
    page.parent.mkdir()
    page.write_bytes(
        gzip.compress(b".TH TOOL 1\n.SH NAME\ntool \\- does things\n" + b"text\n" * 99)
    )
    (page.parent / "broken.1.gz").write_bytes(b"not gzip")
    source = Source("man", "man", tmp_path, ("man[1-8]/*",), lambda _p, t: [roff_to_text(t)])
    documents = read_documents([source])
    assert [d.origin for d in documents] == ["man/man1/tool.1.gz"]
    assert documents[0].text.startswith("TOOL(1)\n\nNAME\n\ntool - does things\n")


def test_manual_macros_become_words() -> None:
    page = (
        '.\\" comment\n.TH LS 1\n.SH OPTIONS\n.TP\n.BR \\-a ", " \\-\\-all\n'
        ".B bold \\fIitalic\\fP\n.de Xx\nhidden\n..\n.Fl v\n\\(bu item \\e n\n"
    )
    text = roff_to_text(page)
    assert "LS(1)" in text
    assert "-a, --all" in text
    assert "bold italic" in text
    assert "-v" in text
    assert "* item \\ n" in text
    assert "hidden" not in text
    assert "comment" not in text


def test_page_that_only_includes_another_is_empty() -> None:
    assert roff_to_text(".so man3/other.3\n") == ""


@pytest.mark.parametrize(
    ("statement", "licence"),
    [
        ("License-Expression: MIT\n", "MIT"),
        ("Licensed under the Apache License 2.0", "Apache-2.0"),
        ("Classifier: License :: OSI Approved :: BSD License", "BSD"),
        ("GNU General Public License. Permission is hereby granted, free of charge", ""),
        ("All rights reserved.", ""),
    ],
)
def test_only_permissive_licences_are_recognised(statement: str, licence: str) -> None:
    assert permissive_licence(statement) == licence


def test_samples_round_trip(tmp_path: Path) -> None:
    corpus = build_corpus(_two_domains())
    write_samples(corpus, tmp_path)
    heldout, calibration = read_sample("heldout", tmp_path), read_sample("calibration", tmp_path)
    assert set(heldout) == set(calibration) == {"code", "man"}
    assert (heldout["code"] == END_OF_TEXT).sum() == len(corpus.documents["heldout"]["code"])


def test_committed_samples_do_not_overlap() -> None:
    texts = read_all_samples()
    long = [p for text in texts for p in paragraphs(text) if len(p) >= 160]
    assert len(long) > 500
    assert len(long) == len(set(long))
    for split in ("heldout", "calibration"):
        sample = read_sample(split)
        assert set(sample) == {"code", "docs", "man"}
        assert all(20_000 <= len(tokens) <= 131_072 for tokens in sample.values())
