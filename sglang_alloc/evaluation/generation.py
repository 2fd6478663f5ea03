"""Offline story, judging: greedy continuations, decoded step by step as a server does it."""

import torch
from torch import Tensor

from sglang_alloc.evaluation.questions import Question
from sglang_alloc.reference.model import Allocation, LayerCache, ReferenceModel

ROWS_PER_BATCH = 64


@torch.no_grad()
def greedy_continuations(
    model: ReferenceModel,
    prompts: Tensor,
    new_tokens: int,
    allocation: Allocation | None,
    decode_allocation: Allocation | None = None,
) -> Tensor:
    """Return the most likely next tokens (W, new_tokens) of prompts (W, S), one at a time.

    `allocation` holds for prefill and decode; `decode_allocation`, if given, for decode. Prompts
    are decoded in batches of ROWS_PER_BATCH.
    """
    batches = [
        _decode(model, part, new_tokens, allocation, decode_allocation or allocation)
        for part in torch.split(prompts, ROWS_PER_BATCH)
    ]
    return torch.cat(batches)


def _decode(
    model: ReferenceModel,
    prompts: Tensor,
    new_tokens: int,
    prefill: Allocation | None,
    decode: Allocation | None,
) -> Tensor:
    caches = [LayerCache() for _ in range(model.config.num_layers)]
    tokens = model(prompts, prefill, caches).logits[:, -1].argmax(-1, keepdim=True)
    found = [tokens]
    while len(found) < new_tokens:
        tokens = model(tokens, decode, caches).logits[:, -1].argmax(-1, keepdim=True)
        found.append(tokens)
    return torch.cat(found, dim=1)


def agreed_share(found: Tensor, full: Tensor) -> Tensor:
    """Share of each row's tokens before the first that differs, (W,) float64."""
    return (found == full).cumprod(dim=1).double().mean(dim=1)


def right_answers(
    model: ReferenceModel, questions: list[Question], allocation: Allocation | None
) -> Tensor:
    """Whether each answer is right to the last byte, (W,) float64 of zeros and ones."""
    prompts = torch.tensor([list(question.prompt) for question in questions])
    longest = max(len(question.answer) for question in questions)
    found = greedy_continuations(model, prompts, longest + 1, allocation)
    marks = [
        # A special token is no byte: it ends an answer, and no answer holds a zero byte.
        question.is_answered_by(bytes(token if token < 256 else 0 for token in row))
        for row, question in zip(found.tolist(), questions, strict=True)
    ]
    return torch.tensor(marks, dtype=torch.float64)
