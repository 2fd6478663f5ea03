"""Offline story, judging: every rule by its name, calibrated to a budget."""

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sglang_alloc.budget_tables import BudgetTables
from sglang_alloc.evaluation.corrections import CORRECTIONS, corrected
from sglang_alloc.evaluation.quota_rules import (
    best_schedule,
    lexi_profile,
    published_profile,
    uniform_quotas,
)
from sglang_alloc.evaluation.score_rules import (
    Score,
    expert_use,
    global_threshold,
    kept_by_score,
    layerwise_thresholds,
    mass_above,
    measure_expert_use,
    ratio_to_best,
    weight,
)
from sglang_alloc.reference.allocations import (
    layer_allocation,
    threshold_allocation,
    token_allocation,
)
from sglang_alloc.reference.model import Allocation, ReferenceModel
from sglang_alloc.reference.rule_comparison import threshold_of_tables
from sglang_alloc.reference.thresholds import calibrate_thresholds
from sglang_alloc.solve import solve_all_budgets

DEFAULT_RULE = "threshold"
LEXI_SEED = 0


@dataclass(frozen=True)
class Subject:
    """A model under evaluation, its budget tables, and the text (B, S + 1) to calibrate rules on.

    What every budget needs is measured once, when it is first asked for, on `executor`: never one
    whose threads build rules, which would wait for themselves.
    """

    model: ReferenceModel
    tables: BudgetTables
    calibration: Tensor
    executor: Executor

    @property
    def layers(self) -> int:
        return self.model.config.num_layers

    @cached_property
    def saliency(self) -> Tensor:
        assert self.tables.saliency is not None
        return torch.tensor(self.tables.saliency)  # loaded arrays are read-only: torch wants a copy

    @cached_property
    def published_quotas(self) -> NDArray[np.int16]:
        profile = published_profile(self.model, self.calibration, self.executor)
        return solve_all_budgets(profile).quotas

    @cached_property
    def lexi_quotas(self) -> NDArray[np.int16]:
        return solve_all_budgets(lexi_profile(self.model, LEXI_SEED)).quotas

    @cached_property
    def use(self) -> Tensor:
        return measure_expert_use(self.model, self.calibration, self.saliency)

    def row(self, budget: int) -> int:
        """Index of a budget's row in the tables."""
        return budget - self.tables.budget_min


Builder = Callable[[Subject, int], Allocation]


def build_rule(subject: Subject, name: str, budget: int) -> Allocation:
    """Calibrate the rule `name` to `budget` activations per token over all layers."""
    if name in RULES:
        return RULES[name](subject, budget)
    base, _, correction = name.partition(" + ")
    rule = _PLAIN[base](subject, budget)
    return corrected(subject.model, rule, subject.calibration, correction)


def served_threshold(subject: Subject, budget: int) -> Allocation:
    """Mode `threshold` with the thresholds, references and gains of the tables: the default."""
    return threshold_of_tables(subject.tables, budget, subject.saliency)


def plain_threshold(subject: Subject, budget: int) -> Allocation:
    """Mode `threshold` with the tables' mean slots per layer and no correction."""
    assert subject.tables.threshold_quotas is not None
    quotas = subject.tables.threshold_quotas[subject.row(budget)].tolist()
    found = calibrate_thresholds(subject.model, subject.calibration, subject.saliency, quotas)
    return threshold_allocation(found.thresholds, subject.saliency)


def served_layer(subject: Subject, budget: int) -> Allocation:
    """Mode `layer` with the quotas of the tables."""
    return layer_allocation(subject.tables.quotas[subject.row(budget)].tolist())


def served_token(subject: Subject, budget: int) -> Allocation:
    """Mode `token` with the quotas of the tables."""
    return token_allocation(subject.tables.quotas[subject.row(budget)].tolist())


def _uniform(subject: Subject, budget: int) -> Allocation:
    return layer_allocation(uniform_quotas(budget, subject.layers))


def _schedule(subject: Subject, budget: int) -> Allocation:
    assert subject.tables.sensitivity is not None
    model, text = subject.model, subject.calibration
    return layer_allocation(best_schedule(model, text, subject.tables.sensitivity, budget))


def _lexi(subject: Subject, budget: int) -> Allocation:
    return layer_allocation(subject.lexi_quotas[subject.row(budget)].tolist())


def _alloc_l(subject: Subject, budget: int) -> Allocation:
    return layer_allocation(subject.published_quotas[subject.row(budget)].tolist())


def _alloc_t(subject: Subject, budget: int) -> Allocation:
    return token_allocation(uniform_quotas(budget, subject.layers))


def _alloc_both(subject: Subject, budget: int) -> Allocation:
    return token_allocation(subject.published_quotas[subject.row(budget)].tolist())


def _weight_threshold(subject: Subject, budget: int) -> Allocation:
    return _by_layer(subject, budget, weight)


def _naee(subject: Subject, budget: int) -> Allocation:
    return _by_layer(subject, budget, ratio_to_best)


def _fewer_experts(subject: Subject, budget: int) -> Allocation:
    return _by_layer(subject, budget, expert_use(subject.use))


def _by_layer(subject: Subject, budget: int, score: Score) -> Allocation:
    quotas = [budget / subject.layers] * subject.layers
    return kept_by_score(
        score, layerwise_thresholds(subject.model, subject.calibration, score, quotas)
    )


def _top_p(subject: Subject, budget: int) -> Allocation:
    quota = budget / subject.layers
    found = global_threshold(subject.model, subject.calibration, mass_above, quota)
    return kept_by_score(mass_above, [found] * subject.layers)


# Ours, without corrections; and what corrections are tried on beside them.
_PLAIN: dict[str, Builder] = {
    "layer": served_layer,
    "token": served_token,
    "threshold": plain_threshold,
    "uniform k": _uniform,
}
BASELINES: dict[str, Builder] = {
    "uniform k": _uniform,
    "layer schedule": _schedule,
    "LExI": _lexi,
    "NAEE skipping": _naee,
    "top-p": _top_p,
    "Alloc-L": _alloc_l,
    "Alloc-T": _alloc_t,
    "Alloc-L + Alloc-T": _alloc_both,
    "fewer experts": _fewer_experts,
}
RULES: dict[str, Builder] = {
    DEFAULT_RULE: served_threshold,
    "layer": served_layer,
    "token": served_token,
    "weight threshold": _weight_threshold,
    **BASELINES,
}
# A plain rule without a correction is in RULES already, but for the threshold.
CORRECTED = (
    "threshold + none",
    *(f"{base} + {how}" for base in _PLAIN for how in CORRECTIONS if how != "none"),
)
RULE_NAMES = (*RULES, *CORRECTED)
