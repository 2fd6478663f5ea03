"""The pages do not point at files, targets or commands that do not exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).parents[2]
_PAGES = sorted([*_REPOSITORY.glob("*.md"), *(_REPOSITORY / "docs").glob("*.md")])
_LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: str(page.relative_to(_REPOSITORY)))
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    targets = _LINK.findall(page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_make_target_that_a_page_names_exists() -> None:
    named = {
        target for page in _PAGES for target in re.findall(r"\bmake ([a-z-]+)`", page.read_text())
    }
    assert {"demo", "test", "lint"} <= named
    shown = subprocess.run(
        ["make", "--silent", "help"], cwd=_REPOSITORY, capture_output=True, text=True, check=True
    )
    assert named <= set(re.findall(r"make ([a-z-]+)", shown.stdout))
