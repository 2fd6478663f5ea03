"""What the unit tests share: torch works in one thread, and a table."""

from pathlib import Path

import pytest
import torch
from table_factory import publish_and_open

from sglang_alloc.shared_table import SharedTable


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors gain nothing from threads; on a busy machine these wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def table(tmp_path: Path) -> SharedTable:
    """A small table that was published just now."""
    return publish_and_open(tmp_path / "tiny.tbl")
