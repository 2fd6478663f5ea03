"""What the unit tests share: torch works in one thread."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors gain nothing from threads; on a busy machine these wait for each other."""
    torch.set_num_threads(1)
