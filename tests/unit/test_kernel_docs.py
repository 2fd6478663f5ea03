"""docs/kernels.md names every kernel's host function and every edge case's reason."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
SOURCES = ROOT / "kernels" / "sglang_alloc_kernels"


def test_every_host_function_that_launches_a_kernel_is_in_the_table() -> None:
    table = PAGE[PAGE.index("| function |") :].partition("\n\n")[0]
    documented = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    twins = {
        match[1]
        for path in SOURCES.glob("*.py")
        for match in re.finditer(r"^def (\w+)_torch\(", path.read_text(), re.MULTILINE)
        if re.search(rf"^def {match[1]}\(", path.read_text(), re.MULTILINE)
    }
    assert documented == twins


def test_every_shape_that_the_page_promises_is_a_case() -> None:
    cases = (ROOT / "tests" / "kernels" / "slot_cases.py").read_text(encoding="utf-8")
    for name in ("one token", "no token", "all padding", "ties", "a row of NaN", "K = E", "512"):
        assert name in cases
