"""The pages do not point at files, targets or commands that do not exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).parents[2]
_PAGES = sorted([*_REPOSITORY.glob("*.md"), *(_REPOSITORY / "docs").glob("*.md")])
_BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: str(page.relative_to(_REPOSITORY)))
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    targets = _LINK.findall(page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: str(page.relative_to(_REPOSITORY)))
def test_every_link_to_a_section_leads_to_its_heading(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#\s]*)#([^)\s]+)\)", page.read_text())
    targets = [(page.parent / path if path else page, anchor) for path, anchor in links]
    assert [(path, anchor) for path, anchor in targets if anchor not in _anchors(path)] == []


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings}


def test_every_curl_that_sends_data_says_that_it_is_json() -> None:
    """Without the header curl says that it is a form, which SGLang and the controller refuse."""
    blocks = [block for page in _PAGES for block in _BLOCK.findall(page.read_text())]
    # A command goes on behind a backslash, and on lines that are indented.
    commands = [one for block in blocks for one in re.split(r"(?<!\\)\n(?=\S)", block)]
    sending = [one for one in commands if re.match(r"curl .*\s-d ", one, re.DOTALL)]
    assert len(sending) >= 2
    header = "-H 'Content-Type: application/json'"
    assert [one for one in sending if header not in one] == []


@pytest.mark.parametrize(
    ("page", "steps"),
    [
        ("life-of-a-budget-change.md", "controller/sglang_alloc_controller/law_*.py"),
        ("life-of-a-budget-table.md", "sglang_alloc/profile_*.py"),
        ("life-of-a-budget-table.md", "sglang_alloc/solve*.py"),
        ("life-of-a-budget-table.md", "sglang_alloc/calibrate_*.py"),
        ("life-of-a-budget-table.md", "sglang_alloc/*_record.py"),
    ],
)
def test_a_story_names_each_file_that_takes_a_step_of_it(page: str, steps: str) -> None:
    text = (_REPOSITORY / "docs" / page).read_text()
    files = {path.name for path in _REPOSITORY.glob(steps)} - {"step_record.py"}
    assert len(files) >= 3
    assert {name for name in files if f"`{name}`" not in text} == set()


@pytest.mark.parametrize("page", ["life-of-a-budget-change.md", "life-of-a-budget-table.md"])
def test_a_file_that_a_story_names_exists(page: str) -> None:
    named = re.findall(r"`([\w/]+\.py)`", (_REPOSITORY / "docs" / page).read_text())
    sources = ("sglang_alloc", "kernels", "controller")
    files = [path for source in sources for path in (_REPOSITORY / source).rglob("*.py")]
    assert named
    assert [name for name in named if not any(path.match(name) for path in files)] == []


def test_every_make_target_that_a_page_names_exists() -> None:
    named = {
        target for page in _PAGES for target in re.findall(r"\bmake ([a-z-]+)`", page.read_text())
    }
    assert {"demo", "test", "lint"} <= named
    shown = subprocess.run(
        ["make", "--silent", "help"], cwd=_REPOSITORY, capture_output=True, text=True, check=True
    )
    assert named <= set(re.findall(r"make ([a-z-]+)", shown.stdout))
