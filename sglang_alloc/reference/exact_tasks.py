"""Reference model, data: small problems with one right answer, to train on and to be asked.

Likelihood hides the loss of a small budget until late (arXiv 2505.03531); an answer that must be
right to the last byte does not.
"""

import hashlib
import random
import string
from collections.abc import Callable
from typing import NamedTuple

from sglang_alloc.reference.documents import Document

SYNTHETIC_DOMAIN = "tasks"
LETTERS_MIN, LETTERS_MAX = 3, 6
RECALL_PAIRS_MIN, RECALL_PAIRS_MAX = 3, 6
PROBLEMS_PER_DOCUMENT = 40
_ALPHABET = string.ascii_lowercase


class Problem(NamedTuple):
    """A line of text: `prompt` ends where the model goes on, `answer` is what it must say."""

    task: str
    prompt: str
    answer: str

    @property
    def line(self) -> str:
        return f"{self.prompt}{self.answer}\n"


def copy_problem(random_source: random.Random) -> Problem:
    """`copy wqzk = wqzk`."""
    letters = _letters(random_source)
    return Problem("copy", f"copy {letters} = ", letters)


def reverse_problem(random_source: random.Random) -> Problem:
    """`reverse wqzk = kzqw`."""
    letters = _letters(random_source)
    return Problem("reverse", f"reverse {letters} = ", letters[::-1])


def sort_problem(random_source: random.Random) -> Problem:
    """`sort wqzk = kqwz`."""
    letters = _letters(random_source)
    return Problem("sort", f"sort {letters} = ", "".join(sorted(letters)))


def recall_problem(random_source: random.Random) -> Problem:
    """`recall wq:417 zk:809 ab:333, zk = 809`."""
    count = random_source.randint(RECALL_PAIRS_MIN, RECALL_PAIRS_MAX)
    keys = random_source.sample([a + b for a in _ALPHABET for b in _ALPHABET], count)
    values = [f"{random_source.randrange(1000):03d}" for _ in keys]
    asked = random_source.randrange(count)
    pairs = " ".join(f"{key}:{value}" for key, value in zip(keys, values, strict=True))
    return Problem("recall", f"recall {pairs}, {keys[asked]} = ", values[asked])


TASKS: dict[str, Callable[[random.Random], Problem]] = {
    "copy": copy_problem,
    "reverse": reverse_problem,
    "sort": sort_problem,
    "recall": recall_problem,
}


def task_documents(count: int, seed: int, *, heldout: bool) -> list[Document]:
    """Documents of PROBLEMS_PER_DOCUMENT solved problems, the tasks mixed at random.

    `heldout` says which side of the split the problems come from.
    """
    random_source = random.Random(f"tasks {seed}")
    texts = (
        "".join(_problem(random_source, heldout).line for _ in range(PROBLEMS_PER_DOCUMENT))
        for _ in range(count)
    )
    return [Document(SYNTHETIC_DOMAIN, f"made/{index}", t, "") for index, t in enumerate(texts)]


def heldout_problems(task: str, count: int, seed: int) -> list[Problem]:
    """Return `count` different problems of one task, none of which any training text holds."""
    random_source = random.Random(f"heldout {task} {seed}")
    found: dict[str, Problem] = {}
    while len(found) < count:
        problem = TASKS[task](random_source)
        if is_heldout(problem):
            found[problem.prompt] = problem
    return list(found.values())


def is_heldout(problem: Problem) -> bool:
    """Whether a problem is for asking only: a tenth of them, by the hash of the prompt."""
    return hashlib.sha256(problem.prompt.encode()).digest()[0] % 10 == 0


def _problem(random_source: random.Random, heldout: bool) -> Problem:
    makers = list(TASKS.values())
    while True:
        problem = random_source.choice(makers)(random_source)
        if is_heldout(problem) == heldout:
            return problem


def _letters(random_source: random.Random) -> str:
    length = random_source.randint(LETTERS_MIN, LETTERS_MAX)
    return "".join(random_source.sample(_ALPHABET, length))
