"""Offline story, judging: one point of the grid, a rule at a budget, measured in every way."""

from typing import Any, NamedTuple

from torch import Tensor

from sglang_alloc.evaluation.generation import (
    agreed_share,
    greedy_continuations,
    right_answers,
)
from sglang_alloc.evaluation.material import Material
from sglang_alloc.evaluation.text_measures import measure_text
from sglang_alloc.reference.model import Allocation, ReferenceModel

DIGITS = 7  # of what is kept of a measurement


class Point(NamedTuple):
    """Per-sample measurements of one rule at one budget; samples are the same for all points."""

    rule: str
    budget: int  # asked for, over all layers
    mean_k: float  # measured, per layer
    distinct_experts: dict[int, float]  # per layer and decode step, by batch size
    samples: dict[str, list[float]]  # by measure: nll, kl, agreement, continuation, each task

    def to_json(self) -> dict[str, Any]:
        """The point as a JSON object."""
        return self._asdict()

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Point":
        """The point that `to_json` wrote."""
        distinct = {int(size): count for size, count in found["distinct_experts"].items()}
        return cls(**{**found, "distinct_experts": distinct})


Points = dict[tuple[str, int], Point]  # by rule and budget


def measure_losses(
    model: ReferenceModel, material: Material, rule: str, budget: int, allocation: Allocation | None
) -> Point:
    """Measure an allocation on the text alone; `rule` and `budget` only name the point."""
    text = measure_text(model, allocation, material.windows, material.full_log_probabilities)
    samples = {"nll": text.nll, "kl": text.kl, "agreement": text.agreement}
    usage = text.usage
    return Point(rule, budget, usage.mean_k, usage.distinct_experts, rounded(samples))


def measure_generation(
    model: ReferenceModel, material: Material, rule: str, budget: int, allocation: Allocation | None
) -> Point:
    """Measure what an allocation generates; the point's use is left to `measure_losses`."""
    new_tokens = material.full_continuations.shape[1]
    found = greedy_continuations(model, material.prompts, new_tokens, allocation)
    samples = {"continuation": agreed_share(found, material.full_continuations)}
    for task, questions in material.questions.items():
        samples[task] = right_answers(model, questions, allocation)
    return Point(rule, budget, 0.0, {}, rounded(samples))


def generation_name(rule: str) -> str:
    """The rule name of a point that was measured on generation."""
    return f"generation: {rule}"


def with_generation(points: Points) -> Points:
    """Put what was measured on text and on generation of a rule and budget into one point."""
    together = dict(points)
    for rule, budget in points:
        generated = together.pop((generation_name(rule), budget), None)
        if generated is not None:
            text = points[rule, budget]
            samples = text.samples | generated.samples
            together[rule, budget] = text._replace(samples=samples)
    return together


def rounded(samples: dict[str, Tensor]) -> dict[str, list[float]]:
    """Samples as a journal keeps them."""
    return {n: [round(value, DIGITS) for value in v.tolist()] for n, v in samples.items()}
