"""Offline story, judging: loss at equal distinct experts per decode step, where bytes decide."""

from collections.abc import Iterator

from sglang_alloc.evaluation.jobs import Job
from sglang_alloc.evaluation.material import Material
from sglang_alloc.evaluation.points import Point, measure_losses
from sglang_alloc.evaluation.rules import Subject, build_rule
from sglang_alloc.evaluation.text_measures import BATCH_SIZES
from sglang_alloc.reference.union_sets import served_union

PLAIN_RULE = "uniform k"


def union_name(batch: int) -> str:
    """The rule name of mode `union` at a decode batch."""
    return f"union of {batch}"


def text_name(rule: str) -> str:
    """The rule name of a point that was measured on text alone, at more budgets than others."""
    return f"text: {rule}"


def union_jobs(subject: Subject, material: Material, budgets: list[int]) -> Iterator[Job]:
    """Mode `union` with the tables' rows, for each decode batch."""
    for batch in BATCH_SIZES:
        for budget in budgets:
            yield _union_job(subject, material, batch, budget)


def text_jobs(subject: Subject, material: Material, rule: str, budgets: list[int]) -> Iterator[Job]:
    """A rule on text alone, at many budgets."""
    for budget in budgets:
        yield _text_job(subject, material, rule, budget)


def _union_job(subject: Subject, material: Material, batch: int, budget: int) -> Job:
    name = union_name(batch)

    def measure() -> Point:
        steps = material.windows.shape[1] - 1
        rule = served_union(subject.tables, budget, subject.saliency, batch, steps)
        return measure_losses(subject.model, material, name, budget, rule)

    return Job(name, budget, measure)


def _text_job(subject: Subject, material: Material, rule: str, budget: int) -> Job:
    name = text_name(rule)

    def measure() -> Point:
        allocation = build_rule(subject, rule, budget)
        return measure_losses(subject.model, material, name, budget, allocation)

    return Job(name, budget, measure)
