"""The order of the demo's runs, and the burst that is raised until full quality misses it."""

from collections.abc import Callable, Iterator

import pytest
from demo_runs import make_controlled_run, make_full_run, make_plan

from sglang_alloc.demo.comparison import RAISES_MAX, Comparison, compare
from sglang_alloc.demo.load_plan import RAISED_BURST_RATIO, LoadPlan
from sglang_alloc.demo.observation import RunRecord

KEPT, MISSED = 0.8, 4.0  # TTFTs of the burst, under an SLO of 1 s


class Runs:
    """Stand-ins that keep the order of the calls; the full runs get the given TTFTs in turn."""

    def __init__(self, *burst_ttfts: float) -> None:
        self._ttfts: Iterator[float] = iter(burst_ttfts)
        self.order: list[str] = []
        self.loads: list[float] = []

    def compared(self) -> Comparison:
        fulls = (self._full("before"), self._full("after"))
        return compare(make_plan(), fulls[0], self._controlled, fulls[1])

    def _full(self, name: str) -> Callable[[LoadPlan], RunRecord]:
        def run(plan: LoadPlan) -> RunRecord:
            self._noted(name, plan)
            return make_full_run(next(self._ttfts))

        return run

    def _controlled(self, plan: LoadPlan) -> RunRecord:
        self._noted("controlled", plan)
        return make_controlled_run()

    def _noted(self, name: str, plan: LoadPlan) -> None:
        self.order.append(name)
        self.loads.append(plan.burst_per_second)


def test_the_controlled_run_lies_between_two_at_full_quality_under_one_load() -> None:
    runs = Runs(MISSED, MISSED)
    compared = runs.compared()
    assert runs.order == ["before", "controlled", "after"]
    assert set(runs.loads) == {make_plan().burst_per_second}
    assert compared.plan.carried == ()


def test_a_burst_that_full_quality_carries_is_raised_before_the_controlled_run() -> None:
    runs = Runs(KEPT, KEPT, MISSED, MISSED)
    compared = runs.compared()
    assert runs.order == ["before", "before", "before", "controlled", "after"]
    first = make_plan().burst_per_second
    assert runs.loads[2:] == [pytest.approx(first * RAISED_BURST_RATIO**2)] * 3
    assert [burst.attainment_ratio for burst in compared.plan.carried] == [1.0, 1.0]


def test_a_machine_that_always_carries_the_burst_is_compared_after_so_many_raises() -> None:
    runs = Runs(*[KEPT] * 10)
    compared = runs.compared()
    assert runs.order == [*["before"] * (1 + RAISES_MAX), "controlled", "after"]
    assert len(compared.plan.carried) == RAISES_MAX


@pytest.mark.parametrize("last", [KEPT, MISSED])
def test_neither_the_controlled_run_nor_the_last_one_has_a_say_in_the_load(last: float) -> None:
    runs = Runs(KEPT, MISSED, last)
    compared = runs.compared()
    assert runs.order == ["before", "before", "controlled", "after"]
    assert len(compared.plan.carried) == 1
