"""Offline story, judging: questions with one right answer, from held-out text and made up.

All prompts of a task have the same number of bytes, so that a batch needs no padding.
"""

import random
import re
import string
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from sglang_alloc.reference.exact_tasks import TASKS, Problem, heldout_problems
from sglang_alloc.reference.samples import SAMPLES, SEPARATOR

PROMPT_BYTES = 128
TEXT_TASKS = ("word", "indent")
WORD_LETTERS_MIN, KNOWN_LETTERS = 9, 6
WORD_USES_MIN = 4  # in the calibration samples: a word that the model can have learnt
_WORD = re.compile(rf"\b[a-z]{{{WORD_LETTERS_MIN},}}\b")
_INDENT = re.compile(r"\n( {4,})(?=[^ \n])")


class Question(NamedTuple):
    """A prompt of PROMPT_BYTES bytes, the bytes that must follow it, and those that must not go on.

    An answer that goes on with one of `longer` (more letters of a word, more spaces) is wrong.
    """

    task: str
    prompt: bytes
    answer: bytes
    longer: bytes = b""

    def is_answered_by(self, found: bytes) -> bool:
        """Whether `found`, at least one byte longer than the answer, is right."""
        size = len(self.answer)
        return found[:size] == self.answer and found[size : size + 1] not in self._going_on()

    def _going_on(self) -> set[bytes]:
        return {bytes([byte]) for byte in self.longer}


def questions_of(task: str, count: int, seed: int = 0) -> list[Question]:
    """Return `count` questions of a task of TEXT_TASKS or exact_tasks.TASKS, or fewer.

    `word`: the rest of a common word, given its first KNOWN_LETTERS letters. `indent`: by how many
    spaces the next line is indented. Both are cut from the committed held-out text. The made-up
    tasks come behind as many solved problems of the same task as fit.
    """
    if task in TASKS:
        problems = iter(heldout_problems(task, count * PROMPT_BYTES // 8, seed))
        return [_with_examples(problems) for _ in range(count)]
    found = [question for text in _samples("heldout") for question in _text_questions(task, text)]
    random.Random(seed).shuffle(found)
    return found[:count]


def _samples(split: str) -> list[str]:
    """The excerpts of a committed sample; any character beyond ASCII is one `?`, so one byte."""
    paths = sorted(SAMPLES.glob(f"{split}_*.txt"))
    texts = [text for path in paths for text in path.read_text().split(SEPARATOR)]
    return [text.encode("ascii", errors="replace").decode() for text in texts]


def _text_questions(task: str, text: str) -> Iterator[Question]:
    if task == "indent":
        for match in _INDENT.finditer(text):
            yield from _question(task, text, match.start(1), match.end(1), b" ")
        return
    common = _common_words()
    for match in _WORD.finditer(text):
        if match.group() in common:
            start = match.start() + KNOWN_LETTERS
            yield from _question(task, text, start, match.end(), string.ascii_letters.encode())


def _question(task: str, text: str, start: int, end: int, longer: bytes) -> Iterator[Question]:
    """The question whose answer is text[start:end], if the text before it is long enough."""
    if start >= PROMPT_BYTES:
        prompt = text[start - PROMPT_BYTES : start].encode()
        yield Question(task, prompt, text[start:end].encode(), longer)


def _common_words() -> frozenset[str]:
    uses = Counter(word for text in _samples("calibration") for word in _WORD.findall(text))
    return frozenset(word for word, count in uses.items() if count >= WORD_USES_MIN)


def _with_examples(problems: Iterator[Problem]) -> Question:
    problem = next(problems)
    examples = ""
    while len(examples) + len(problem.prompt) < PROMPT_BYTES:
        examples += next(problems).line
    prompt = (examples + problem.prompt)[-PROMPT_BYTES:]
    return Question(problem.task, prompt.encode(), f"{problem.answer}\n".encode())
