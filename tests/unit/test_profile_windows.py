"""Windows of calibration text, and text that does not do."""

from pathlib import Path

import pytest

from sglang_alloc.errors import ConfigurationError
from sglang_alloc.profile_windows import (
    Window,
    cut_windows,
    digest,
    read_text,
    require_vocabulary,
)


def test_windows_come_from_the_texts_in_turn_and_do_not_overlap() -> None:
    windows = cut_windows([range(100, 130), range(200, 212)], 4, 2, 5)
    assert [w.prefix[0] // 100 for w in windows] == [1, 2, 1, 2, 1]
    seen = [token for w in windows for token in (*w.prefix, *w.continuation)]
    assert len(seen) == len(set(seen)) == 30
    assert all((len(w.prefix), len(w.continuation)) == (4, 2) for w in windows)


def test_the_same_text_gives_the_same_windows() -> None:
    first, again = (cut_windows([range(50)], 4, 2, 3) for _ in range(2))
    assert digest(first) == digest(again) != digest(cut_windows([range(60)], 4, 2, 3))


def test_text_shorter_than_one_window_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"has 9 tokens, and one window needs 10"):
        cut_windows([range(9), range(3)], 6, 4, 1)


def test_text_for_fewer_windows_than_asked_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"holds 3 windows .* asks for 4"):
        cut_windows([range(25), range(10)], 6, 4, 4)


def test_a_token_that_the_model_does_not_know_is_another_tokenizer_s() -> None:
    with pytest.raises(ConfigurationError, match="gave token 300, and the model has 264"):
        require_vocabulary([Window((1, 2), (300,))], 264)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="cannot be read as UTF-8"):
        read_text([tmp_path / "text"])
    with pytest.raises(ConfigurationError, match=r"UTF-8: No such file or directory\. Give a text"):
        read_text([tmp_path / "absent"])
