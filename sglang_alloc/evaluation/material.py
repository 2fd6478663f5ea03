"""Offline story, judging: the held-out text, prompts and questions that every rule is put through.

All of it lies inside the trained context, beyond which losses mean nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sglang_alloc.errors import ConfigurationError
from sglang_alloc.evaluation.generation import greedy_continuations, right_answers
from sglang_alloc.evaluation.questions import TEXT_TASKS, Question, questions_of
from sglang_alloc.evaluation.text_measures import ROWS_PER_PASS, full_log_probabilities
from sglang_alloc.reference.exact_tasks import TASKS
from sglang_alloc.reference.heldout import windows_of
from sglang_alloc.reference.model import ReferenceModel
from sglang_alloc.reference.samples import read_sample

# A task that the full model fails at tells nothing about a budget.
RIGHT_SHARE_MIN = 0.4


class Sizes(NamedTuple):
    """How much is measured; more gives narrower intervals."""

    windows: int = 64  # a multiple of 32, the largest decode batch
    window_tokens: int = 512
    prompts: int = 32
    prompt_tokens: int = 128
    new_tokens: int = 24
    questions: int = 64  # of each task
    neighbour_requests: int = 4  # each decoded among two sets of neighbours
    calibration_windows: int = 24
    calibration_tokens: int = 512


class Material(NamedTuple):
    """What rules are measured on, and what the full model makes of it."""

    windows: Tensor  # (W, S + 1), the domains in turn
    full_log_probabilities: Tensor  # (W, S, V)
    prompts: Tensor  # (P, S)
    full_continuations: Tensor  # (P, new_tokens)
    questions: dict[str, list[Question]]


def domains_in_turn(split: str, count: int, window_tokens: int) -> Tensor:
    """Return `count` windows (W, S + 1) of the committed samples; neighbours differ in domain.

    Raises:
        ConfigurationError: a domain's text is shorter than a window, or all hold too few of them.
    """
    by_domain = read_sample(split)
    each = -(-count // len(by_domain))
    for domain, tokens in by_domain.items():
        if len(tokens) <= window_tokens:
            raise ConfigurationError(
                f"Windows of {window_tokens} tokens were asked for, and the {split} text of domain "
                f"{domain} has {len(tokens)}. Ask for shorter windows."
            )
    rows = [windows_of(tokens, window_tokens, each) for tokens in by_domain.values()]
    turns = max(map(len, rows))
    picked = [part[turn] for turn in range(turns) for part in rows if turn < len(part)]
    if len(picked) < count:
        raise ConfigurationError(
            f"{count} windows of {window_tokens} tokens were asked for, and the {split} text has "
            f"{len(picked)}. Ask for fewer or for shorter ones."
        )
    return torch.stack(picked[:count])


def gather_material(model: ReferenceModel, sizes: Sizes) -> Material:
    """Cut the held-out text and run the full model on it once."""
    windows = domains_in_turn("heldout", sizes.windows, sizes.window_tokens)
    assert len(windows) % ROWS_PER_PASS == 0
    prompts = domains_in_turn("heldout", sizes.prompts, sizes.prompt_tokens)[:, :-1]
    return Material(
        windows,
        full_log_probabilities(model, windows),
        prompts,
        greedy_continuations(model, prompts, sizes.new_tokens, None),
        able_questions(model, sizes.questions),
    )


def able_questions(model: ReferenceModel, count: int) -> dict[str, list[Question]]:
    """Questions of the tasks that the full model can do.

    The made-up tasks if it can do at least two of them, because no answer of those can be known by
    heart; else those cut from text.
    """
    for tasks in (tuple(TASKS), TEXT_TASKS):
        asked = {task: questions_of(task, count) for task in tasks}
        right = {task: right_answers(model, questions, None) for task, questions in asked.items()}
        able = [task for task, marks in right.items() if float(marks.mean()) >= RIGHT_SHARE_MIN]
        if len(able) > 1:
            break
    return {task: asked[task] for task in able}
