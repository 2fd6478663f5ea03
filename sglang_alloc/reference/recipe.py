"""Reference model, training: what is trained on when; every step is a function of the seed."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sglang_alloc.reference.exact_tasks import SYNTHETIC_DOMAIN


class TrainingPhase(NamedTuple):
    """A stretch of steps at one window length."""

    window_tokens: int
    windows_per_step: int
    steps: int


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the trained weights, besides the corpus and the architecture."""

    phases: tuple[TrainingPhase, ...] = (TrainingPhase(256, 8, 1_500), TrainingPhase(1_024, 4, 300))
    seed: int = 20_261_125
    learning_rate: float = 3e-3
    final_learning_rate_ratio: float = 0.05
    warmup_steps: int = 60
    weight_decay: float = 0.1
    beta2: float = 0.98
    gradient_norm_max: float = 1.0
    balance_weight: float = 0.01  # as OLMoE; without it a few experts take all the tokens
    # At the full rate a token's first expert took 67-93% of the weight (layer means), top-4 lost
    # 0.002 nats against top-8, and held-out loss was higher.
    router_learning_rate_ratio: float = 0.1
    micro_batches: int = 2
    synthetic_share: float = 0.0  # of the windows, drawn from the problems of exact_tasks

    @property
    def total_steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def tokens_before(self, step: int) -> int:
        """Tokens trained on in the first `step` steps."""
        tokens = 0
        for phase in self.phases:
            steps = min(step, phase.steps)
            tokens += steps * phase.windows_per_step * phase.window_tokens
            step -= steps
        return tokens

    def phase_at(self, step: int) -> TrainingPhase:
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        raise IndexError("step lies behind the last phase")


def reference_recipe(family: str) -> Recipe:
    """The recipe of a family's model: OLMoE's also learns to solve small problems."""
    return Recipe(synthetic_share=0.3) if family == "olmoe" else Recipe()


def learning_rate_at(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine down to `final_learning_rate_ratio` of the peak."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.total_steps - recipe.warmup_steps)
    floor = recipe.final_learning_rate_ratio
    return recipe.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


def training_windows(streams: dict[str, NDArray[np.int16]], recipe: Recipe, step: int) -> Tensor:
    """Draw the step's windows (B, window + 1), int64: a domain at random, then a place in it.

    Domains are drawn equally, but for the made-up one, which has a share of its own.

    Depends on the seed and the step alone, so a resumed run sees what an uninterrupted one sees.
    """
    phase = recipe.phase_at(step)
    random = np.random.default_rng([recipe.seed, step])
    names = sorted(set(streams) - {SYNTHETIC_DOMAIN})
    rows = []
    for _ in range(phase.windows_per_step):
        made_up = recipe.synthetic_share > 0 and random.random() < recipe.synthetic_share
        stream = streams[SYNTHETIC_DOMAIN if made_up else names[random.integers(len(names))]]
        start = int(random.integers(len(stream) - phase.window_tokens))
        rows.append(stream[start : start + phase.window_tokens + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64))
