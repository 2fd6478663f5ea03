"""Reference model, training: one optimiser step over micro-batches that run side by side."""

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sglang_alloc.reference.model import ReferenceModel
from sglang_alloc.reference.recipe import Recipe, learning_rate_at


class StepResult(NamedTuple):
    """Mean cross-entropy in nats per byte, and balance loss."""

    loss: float
    balance_loss: float


def build_optimizer(model: ReferenceModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; norms and the embedding are not decayed, routers learn slower."""
    kinds: dict[str, list[Tensor]] = {"matrices": [], "routers": [], "others": []}
    for name, weight in model.named_parameters():
        plain = weight.ndim == 1 or "embed" in name
        router = name.endswith("mlp.gate.weight")
        kinds["others" if plain else "routers" if router else "matrices"].append(weight)
    decay, slow = recipe.weight_decay, recipe.router_learning_rate_ratio
    groups = [
        {"params": kinds["matrices"], "weight_decay": decay, "rate_ratio": 1.0},
        {"params": kinds["routers"], "weight_decay": decay, "rate_ratio": slow},
        {"params": kinds["others"], "weight_decay": 0.0, "rate_ratio": 1.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, recipe.beta2), fused=True)


def training_step(
    model: ReferenceModel,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    step: int,
    windows: Tensor,
    *,
    executor: Executor,
) -> StepResult:
    """Update the model on windows (B, S + 1).

    Micro-batches are mapped over `executor`, one thread each, and their gradients added in a fixed
    order, so the result does not depend on how many run at once. On a busy 2-core machine this is
    several times faster than two threads inside each of the model's thousands of small operations.
    """
    parameters = list(model.parameters())
    parts = list(executor.map(lambda part: _gradients(model, recipe, part),
                              windows.chunk(recipe.micro_batches)))  # fmt: skip
    for index, parameter in enumerate(parameters):
        total = parts[0][0][index]
        for gradients, _, _ in parts[1:]:
            total += gradients[index]
        parameter.grad = total / len(parts)
    torch.nn.utils.clip_grad_norm_(parameters, recipe.gradient_norm_max)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(recipe, step) * group["rate_ratio"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    losses = torch.tensor([[loss, balance] for _, loss, balance in parts]).mean(0)
    return StepResult(float(losses[0]), float(losses[1]))


def _gradients(
    model: ReferenceModel, recipe: Recipe, windows: Tensor
) -> tuple[Sequence[Tensor], float, float]:
    output = model(windows[:, :-1])
    loss = functional.cross_entropy(output.logits.flatten(0, 1), windows[:, 1:].flatten())
    total = loss + recipe.balance_weight * output.balance_loss
    gradients = torch.autograd.grad(total, list(model.parameters()))
    return gradients, loss.item(), output.balance_loss.item()
