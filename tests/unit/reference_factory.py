"""Tiny reference models, texts and runs for the tests."""

import io
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from sglang_alloc.reference.architecture import ReferenceConfig
from sglang_alloc.reference.documents import Document
from sglang_alloc.reference.model import ReferenceModel, initialise
from sglang_alloc.reference.recipe import Recipe, TrainingPhase
from sglang_alloc.reference.token_streams import TokenStreams
from sglang_alloc.reference.training_run import TrainingRun

TINY_RECIPE = Recipe(phases=(TrainingPhase(16, 2, 6), TrainingPhase(32, 2, 4)), warmup_steps=2)


def make_config(family: str = "qwen3_moe") -> ReferenceConfig:
    return ReferenceConfig(
        family, num_layers=2, hidden_size=32, num_heads=2, num_kv_heads=1, head_dim=16,
        num_experts=8, top_k=4, moe_intermediate_size=8,
    )  # fmt: skip


def make_model(family: str = "qwen3_moe") -> ReferenceModel:
    model = ReferenceModel(make_config(family))
    initialise(model, seed=1)
    return model.eval()


def make_windows(count: int = 4, window_tokens: int = 48, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, window_tokens + 1), generator=generator)


def make_streams() -> TokenStreams:
    random = np.random.default_rng(0)
    train, heldout = (
        {name: random.integers(0, 256, 2_000).astype(np.int16) for name in ("code", "man")}
        for _ in range(2)
    )
    return TokenStreams(train, heldout, {})


def make_run(
    path: Path, recipe: Recipe = TINY_RECIPE, streams: TokenStreams | None = None
) -> TrainingRun:
    return TrainingRun(make_config(), recipe, streams or make_streams(), path)


def silent_console() -> Console:
    return Console(file=io.StringIO())


def make_documents(count: int = 400, domain: str = "code") -> list[Document]:
    """Documents of three paragraphs, all different."""
    return [
        Document(domain, f"label/{domain}/{i}.txt", "\n\n".join(
            f"{domain} document {i}, paragraph {j}: " + f"words {i * 3 + j} " * 60 for j in range(3)
        ), "MIT")
        for i in range(count)
    ]  # fmt: skip
