"""Offline story, profiling: the calibration text as windows of a prefix and what follows it."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sglang_alloc.errors import ConfigurationError, reason_of


class Window(NamedTuple):
    """Token ids of one piece of text: a prefix, and the continuation whose loss is measured."""

    prefix: tuple[int, ...]
    continuation: tuple[int, ...]


def read_text(paths: Sequence[Path]) -> list[str]:
    """Return the calibration texts.

    Raises:
        ConfigurationError: a file is missing, empty or not UTF-8.
    """
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = reason_of(error)
            raise ConfigurationError(
                f"The calibration text {path} cannot be read as UTF-8: {reason}. Give a text file "
                "with --text, or leave it out for the bundled text."
            ) from error
    return texts


def require_room_for_windows(
    texts: Sequence[str], prefix_tokens: int, continuation_tokens: int, count: int
) -> None:
    """Raise `ConfigurationError` when the texts cannot hold `count` windows by any tokenizer.

    A token is a byte at least; one more may be set ahead of a text. What the tokenizer of the model
    makes of it is known only once a server runs.
    """
    length = prefix_tokens + continuation_tokens
    sizes = [len(text.encode()) for text in texts]
    most = sum((size + 1) // length for size in sizes)
    if most < count:
        raise ConfigurationError(
            f"The calibration text has {sum(sizes)} bytes, which are at most {most} windows, and "
            f"--windows asks for {count}: one window needs {length} tokens, each a byte or more, "
            "from one text. Give more text, or fewer or shorter windows."
        )


def cut_windows(
    texts: Sequence[Sequence[int]], prefix_tokens: int, continuation_tokens: int, count: int
) -> list[Window]:
    """Cut `count` windows that do not overlap, evenly over the texts and in turn between them.

    Raises:
        ConfigurationError: no text is as long as one window, or they hold fewer windows.
    """
    length = prefix_tokens + continuation_tokens
    room = [len(tokens) // length for tokens in texts]
    if sum(room) == 0:
        raise ConfigurationError(
            f"The longest calibration text has {max(map(len, texts), default=0)} tokens, and one "
            f"window needs {length} (--prefix-tokens {prefix_tokens} and --continuation-tokens "
            f"{continuation_tokens}). Give longer text or shorter windows."
        )
    if sum(room) < count:
        raise ConfigurationError(
            f"The calibration text holds {sum(room)} windows of {length} tokens, and --windows "
            f"asks for {count}. Give more text or ask for fewer."
        )
    shares = _shares(room, count)
    pieces = [
        [tuple(tokens[start : start + length]) for start in _starts(len(tokens), length, share)]
        for tokens, share in zip(texts, shares, strict=True)
    ]
    in_turn = [piece for turn in range(max(shares)) for some in pieces for piece in some[turn:][:1]]
    return [Window(piece[:prefix_tokens], piece[prefix_tokens:]) for piece in in_turn]


def digest(windows: Sequence[Window]) -> str:
    """Return the SHA-256 of the windows' token ids."""
    flat = np.array([[*w.prefix, *w.continuation] for w in windows], np.int64)
    return hashlib.sha256(flat.tobytes()).hexdigest()


def require_vocabulary(windows: Sequence[Window], vocab_size: int) -> None:
    """Raise `ConfigurationError` when a token id is outside the model's vocabulary."""
    highest = max(max(*window.prefix, *window.continuation) for window in windows)
    if highest >= vocab_size:
        raise ConfigurationError(
            f"The tokenizer gave token {highest}, and the model has {vocab_size}: it is the "
            "tokenizer of another model. Give SGLang the right --tokenizer-path."
        )


def _shares(room: Sequence[int], count: int) -> list[int]:
    """Return how many windows each text gives: one at a time, in turn, while it has room."""
    shares = [0] * len(room)
    while sum(shares) < count:
        for index, limit in enumerate(room):
            if shares[index] < limit and sum(shares) < count:
                shares[index] += 1
    return shares


def _starts(tokens: int, length: int, count: int) -> list[int]:
    if count == 0:
        return []
    return [int(start) for start in np.linspace(0, tokens - length, count)]
