"""Offline story, judging: the whole evaluation of one model, from its folder to the report."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from sglang_alloc.budget_tables import BudgetTables, load_budget_tables
from sglang_alloc.errors import ConfigurationError, reason_of
from sglang_alloc.evaluation.decode_union import PLAIN_RULE, text_jobs, union_jobs
from sglang_alloc.evaluation.findings import FULL_RULE
from sglang_alloc.evaluation.jobs import Job, run_jobs
from sglang_alloc.evaluation.journal import EvaluationJournal
from sglang_alloc.evaluation.material import Material, Sizes, domains_in_turn, gather_material
from sglang_alloc.evaluation.neighbours import neighbour_jobs
from sglang_alloc.evaluation.points import (
    Point,
    generation_name,
    measure_generation,
    measure_losses,
    with_generation,
)
from sglang_alloc.evaluation.report import write_report
from sglang_alloc.evaluation.rules import (
    CORRECTED,
    DEFAULT_RULE,
    RULE_NAMES,
    RULES,
    Subject,
    build_rule,
)
from sglang_alloc.evaluation.switching import switching_jobs
from sglang_alloc.model_identity import identity_from_config
from sglang_alloc.reference.architecture import FAMILIES
from sglang_alloc.reference.export import load_checkpoint
from sglang_alloc.reference.model import Allocation

JOURNAL_NAME = "points.jsonl"
FRACTIONS = (1 / 3, 1 / 2, 2 / 3, 5 / 6)
PREDICTED_BUDGETS = 12  # spread over all of them, to compare predicted with measured losses


class Evaluation(NamedTuple):
    """What to evaluate: a reference model's folder, its tables, how much, and where to."""

    folder: Path
    tables: Path
    output: Path
    sizes: Sizes
    fractions: Sequence[float] = FRACTIONS
    rivals: Sequence[str] = ()  # compare the losses of the default with these alone
    workers: int = 2


def evaluate(asked: Evaluation, console: Console) -> Path:
    """Measure everything that the journal in the output folder lacks; return the report's path.

    Raises:
        ConfigurationError: the folder is no reference model, the tables are another model's or
            lack what the modes need, or the journal belongs to another evaluation.
    """
    tables = checked_tables(asked)
    unknown = [name for name in asked.rivals if name not in RULE_NAMES]
    if unknown:
        raise ConfigurationError(
            f"There is no rule {unknown[0]!r} to compare with. Rules: {', '.join(RULE_NAMES)}."
        )
    journal = EvaluationJournal(asked.output / JOURNAL_NAME, identity_of(asked))
    torch.set_num_threads(1)  # whole passes run side by side instead
    model = load_checkpoint(asked.folder)
    text = domains_in_turn(
        "calibration", asked.sizes.calibration_windows, asked.sizes.calibration_tokens
    )
    with ThreadPoolExecutor(asked.workers) as executor:
        subject = Subject(model, tables, text, executor)
        material = gather_material(model, asked.sizes)
        run_jobs(all_jobs(subject, material, asked), journal, console, asked.workers)
    return write_report(asked.output, tables, with_generation(journal.points))


def checked_tables(asked: Evaluation) -> BudgetTables:
    """Load the tables and make sure that they are the model's and hold every mode."""
    config = _config(asked.folder)
    if config.get("model_type") not in FAMILIES:
        raise ConfigurationError(
            f"{asked.folder} holds a model of type {config.get('model_type')!r}. Every rule is "
            f"compared on the reference models ({', '.join(FAMILIES)}); a real checkpoint is "
            "evaluated through its server, with `sglang-alloc evaluate-served`."
        )
    tables = load_budget_tables(asked.tables)
    if tables.fingerprint != identity_from_config(config).fingerprint():
        raise ConfigurationError(
            f"{asked.tables} was made for {tables.model_id}, which is another model than the one "
            f"in {asked.folder}. Pass the tables that were made for it."
        )
    for name in ("thresholds", "threshold_quotas", "saliency", "union_thresholds", "sensitivity"):
        if getattr(tables, name) is None:
            raise ConfigurationError(
                f"{asked.tables} holds no {name}, and the modes are judged with it. Make the "
                "tables again with `python -m sglang_alloc.reference.calibrate`."
            )
    return tables


def _config(folder: Path) -> dict[str, object]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = reason_of(error)
        raise ConfigurationError(
            f"{path} was to say which model is evaluated and cannot be read: {reason}. Give the "
            "folder of a reference model, such as sglang_alloc/reference/qwen3-moe-ref."
        ) from error
    if not isinstance(config, dict):
        raise ConfigurationError(f"{path} is not a JSON object, so it is no model's.")
    return config


def identity_of(asked: Evaluation) -> dict[str, object]:
    """What decides every measured number, for the journal."""
    return {
        "model": asked.folder.name,
        "checkpoint": _digest(asked.folder / "model.safetensors"),
        "tables": _digest(asked.tables),
        "sizes": asked.sizes._asdict(),
    }


def budgets_of(tables: BudgetTables, fractions: Sequence[float]) -> list[int]:
    """Fractions of the full budget as whole activations per token."""
    return sorted({max(tables.budget_min, round(tables.budget_max * f)) for f in fractions})


def all_jobs(subject: Subject, material: Material, asked: Evaluation) -> list[Job]:
    """Every point, what the comparison of the default with the baselines needs first."""
    if asked.rivals:
        return _losses_of(subject, material, (DEFAULT_RULE, *asked.rivals), asked)
    tables, layers = subject.tables, subject.layers
    budgets, full = budgets_of(tables, asked.fractions), tables.budget_max
    spread = sorted({int(b) for b in torch.linspace(tables.budget_min, full, PREDICTED_BUDGETS)})
    uniform = list(range(layers, full, layers))
    few = tuple(budgets_of(tables, (1 / 4, 1 / 2, 1)))
    grid = [(rule, budget) for budget, rule in product(budgets, RULES)]
    baselines = [name for name in CORRECTED if name.startswith(PLAIN_RULE)]
    ours = [name for name in CORRECTED if name not in baselines]
    return [
        _text_job(subject, material, FULL_RULE, full),
        *(_text_job(subject, material, *place) for place in grid),
        *(_text_job(subject, material, *place) for place in product(baselines, budgets)),
        *text_jobs(subject, material, PLAIN_RULE, uniform),
        *union_jobs(subject, material, uniform),
        *text_jobs(subject, material, DEFAULT_RULE, spread),
        *text_jobs(subject, material, "layer", spread),
        *switching_jobs(subject, material, few),
        *neighbour_jobs(subject, material, few[:-1], asked.sizes.neighbour_requests),
        _generation_job(subject, material, FULL_RULE, full),
        *(_generation_job(subject, material, *place) for place in grid),
        *(_text_job(subject, material, *place) for place in product(ours, budgets)),
    ]


def _losses_of(
    subject: Subject, material: Material, rules: Sequence[str], asked: Evaluation
) -> list[Job]:
    budgets = budgets_of(subject.tables, asked.fractions)
    full = _text_job(subject, material, FULL_RULE, subject.tables.budget_max)
    return [full, *(_text_job(subject, material, *place) for place in product(rules, budgets))]


def _text_job(subject: Subject, material: Material, rule: str, budget: int) -> Job:
    def measure() -> Point:
        allocation = _rule(subject, rule, budget)
        return measure_losses(subject.model, material, rule, budget, allocation)

    return Job(rule, budget, measure)


def _generation_job(subject: Subject, material: Material, rule: str, budget: int) -> Job:
    name = generation_name(rule)

    def measure() -> Point:
        allocation = _rule(subject, rule, budget)
        return measure_generation(subject.model, material, name, budget, allocation)

    return Job(name, budget, measure)


def _rule(subject: Subject, rule: str, budget: int) -> Allocation | None:
    return None if rule == FULL_RULE else build_rule(subject, rule, budget)


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigurationError(
            f"{path} is part of what is evaluated and cannot be read: {error.strerror}."
        ) from error
