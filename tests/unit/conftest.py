"""Property tests state facts, not speed: a busy machine must not fail them."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("without a deadline", deadline=None)
settings.load_profile("without a deadline")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors gain nothing from threads; on a busy machine these wait for each other."""
    torch.set_num_threads(1)
