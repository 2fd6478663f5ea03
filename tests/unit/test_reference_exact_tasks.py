"""Made-up problems: right answers, and none that is asked was trained on."""

import random

import numpy as np
import pytest

from sglang_alloc.reference.exact_tasks import (
    PROBLEMS_PER_DOCUMENT,
    SYNTHETIC_DOMAIN,
    TASKS,
    heldout_problems,
    task_documents,
)
from sglang_alloc.reference.recipe import Recipe, TrainingPhase, reference_recipe, training_windows

ANSWERS = {
    "copy": lambda words: words[1],
    "reverse": lambda words: words[1][::-1],
    "sort": lambda words: "".join(sorted(words[1])),
    "recall": lambda words: dict(w.rstrip(",").split(":") for w in words[1:-2])[words[-2]],
}


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_is_right(task: str) -> None:
    for problem in heldout_problems(task, 50, seed=3):
        assert problem.answer == ANSWERS[task](problem.prompt.split())


def test_no_problem_that_is_asked_was_trained_on() -> None:
    trained = {line for d in task_documents(100, 0, heldout=False) for line in d.text.splitlines()}
    asked = {line for d in task_documents(100, 1, heldout=True) for line in d.text.splitlines()}
    asked |= {p.line.rstrip("\n") for task in TASKS for p in heldout_problems(task, 200, seed=0)}
    assert len(trained) > 3_000
    assert not trained & asked


def test_documents_depend_on_the_seed_alone() -> None:
    first = task_documents(3, 7, heldout=False)
    assert first == task_documents(3, 7, heldout=False)
    assert first != task_documents(3, 8, heldout=False)
    assert all(d.text.count("\n") == PROBLEMS_PER_DOCUMENT for d in first)
    random.seed(0)  # the module's own source of randomness is not the global one
    assert first == task_documents(3, 7, heldout=False)


def test_the_made_up_domain_gets_its_share_and_the_others_are_equal() -> None:
    streams = {name: np.full(100, index, dtype=np.int16) for index, name in enumerate("ab")}
    streams[SYNTHETIC_DOMAIN] = np.full(100, 2, dtype=np.int16)
    recipe = Recipe(phases=(TrainingPhase(8, 20, 100),), synthetic_share=0.3)
    drawn = np.concatenate([training_windows(streams, recipe, s)[:, 0] for s in range(100)])
    shares = np.bincount(drawn, minlength=3) / len(drawn)
    assert np.allclose(shares, [0.35, 0.35, 0.3], atol=0.03)


def test_only_the_second_family_learns_problems() -> None:
    assert reference_recipe("qwen3_moe") == Recipe()
    assert reference_recipe("olmoe").synthetic_share > 0
