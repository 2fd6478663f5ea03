"""Whether a table can be served with given settings: one answer, before a server and inside it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from table_factory import make_full_tables, make_tables

from sglang_alloc.allocation_mode import Mode, Probe, note_of_probe, probe_of_note
from sglang_alloc.budget_tables import BudgetTables
from sglang_alloc.errors import ConfigurationError
from sglang_alloc.priority_floors import PriorityFloor
from sglang_alloc.serve_table import WorkerOptions, read_source, worker_environment
from sglang_alloc.serving_rules import facts_of, mode_to_serve
from sglang_alloc.shared_table import Fallback, SharedTable, publish_shared_table
from sglang_alloc.worker_settings import WorkerSettings

FULL, PLAIN = make_full_tables(), make_tables()
Choose = Callable[..., Mode]


@pytest.fixture
def choose(tmp_path: Path) -> Iterator[Choose]:
    with ExitStack() as opened:

        def mode_of(tables: BudgetTables, note: str = "", **settings: Any) -> Mode:
            path = tmp_path / "t.tbl"
            publish_shared_table(path, tables, mode_note=note)
            table = opened.enter_context(SharedTable.open(path))
            return mode_to_serve(WorkerSettings(path, **settings), facts_of(table))

        yield mode_of


def test_the_mode_follows_what_the_table_holds(choose: Choose) -> None:
    assert choose(PLAIN) == "layer"
    assert choose(PLAIN, mode="token") == "token"
    assert choose(FULL) == "threshold"
    assert choose(FULL, "a note of another kind") == "threshold"


@pytest.mark.parametrize(
    ("mode", "lacking"),
    [("threshold", "no thresholds"), ("union", "no union_quotas or union_thresholds")],
)
def test_a_mode_that_the_table_has_no_rows_for_is_refused(
    choose: Choose, mode: Mode, lacking: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"holds {lacking}"):
        choose(PLAIN, mode=mode)
    with pytest.raises(ConfigurationError, match=f"holds {lacking}"):
        choose(PLAIN, mode)


def test_a_table_for_one_mode_is_served_in_no_other(choose: Choose) -> None:
    assert choose(FULL, "layer") == choose(FULL, "layer", mode="layer") == "layer"
    with pytest.raises(ConfigurationError, match=r"published for mode layer.*--mode threshold"):
        choose(FULL, "layer", mode="threshold")


def test_probes_are_for_the_profiler_alone(choose: Choose, tmp_path: Path) -> None:
    note = note_of_probe(Probe("union", "saliency"))
    with pytest.raises(ConfigurationError, match="table of probes"):
        choose(FULL, note)
    assert choose(FULL, note, profile_folder=tmp_path) == "union"
    assert choose(PLAIN, note, profile_folder=tmp_path) == "union"  # by the probes' own rows


@pytest.mark.parametrize("budgets", [(2, 3), (3, 2), (12, 13)])
def test_a_fallback_without_a_row_is_refused(choose: Choose, budgets: tuple[int, int]) -> None:
    assert choose(PLAIN, fallback=Fallback("budget", 3, 12)) == "layer"
    with pytest.raises(ConfigurationError, match="covers 3 to 12"):
        choose(PLAIN, fallback=Fallback("budget", *budgets))


@pytest.mark.parametrize("budget", [2, 13])
def test_a_floor_without_a_row_is_refused(choose: Choose, budget: int) -> None:
    for served in (3, 12, None):
        assert choose(PLAIN, priority_floors=(PriorityFloor(5, served),)) == "layer"
    match = rf"floor of priority 5 .* of {budget} activations .* covers 3 to 12. Use full or such"
    with pytest.raises(ConfigurationError, match=match):
        choose(PLAIN, priority_floors=(PriorityFloor(5, budget),))


@pytest.mark.parametrize("least", [4, 9])
def test_floors_that_do_not_rise_are_refused(choose: Choose, least: int) -> None:
    floors = (PriorityFloor(0, 9), PriorityFloor(5, least))
    with pytest.raises(ConfigurationError, match=f"the floor 5:{least} .* is not above 0:9"):
        choose(PLAIN, priority_floors=floors)


@pytest.mark.parametrize("floors", [(12, None), (None, 12), (None, 5), (None, None)])
def test_nothing_is_above_full_quality(choose: Choose, floors: tuple[int | None, ...]) -> None:
    pair = tuple(map(PriorityFloor, (0, 5), floors))
    with pytest.raises(ConfigurationError, match="full quality is 12"):
        choose(PLAIN, priority_floors=pair)


@pytest.mark.parametrize("mode", ["layer", "threshold", "token", "union"])
def test_every_mode_can_serve_floors(choose: Choose, mode: Mode) -> None:
    floors = (PriorityFloor(0, 4), PriorityFloor(5, 9), PriorityFloor(10, None))
    assert choose(FULL, mode=mode, priority_floors=floors) == mode


def test_thresholds_are_moved_only_where_it_is_known_what_they_keep(choose: Choose) -> None:
    assert choose(FULL, correct_drift=True) == "threshold"
    for refused in ({"mode": "layer"}, {"mode": "union"}):
        with pytest.raises(ConfigurationError, match="how many slots"):
            choose(FULL, correct_drift=True, **refused)
    with pytest.raises(ConfigurationError, match="served in mode layer"):
        choose(PLAIN, correct_drift=True)


def test_serve_refuses_a_table_that_its_processes_would_refuse(tmp_path: Path) -> None:
    publish_shared_table(tmp_path / "t.tbl", PLAIN, mode_note="threshold")
    options = WorkerOptions(None, "full", 10.0, "lower", None, "", False, "engine")
    with pytest.raises(ConfigurationError, match="holds no thresholds"):
        worker_environment(read_source(tmp_path / "t.tbl", None), options)


@pytest.mark.parametrize("probe", [Probe("layer"), Probe("layer", "lexi"), Probe("union", "gains")])
def test_a_note_of_probes_says_what_they_are_for(probe: Probe) -> None:
    assert probe_of_note(note_of_probe(probe)) == probe
    assert probe_of_note(probe.mode) is None


@pytest.mark.parametrize("note", ["probe:", "probe:best", "probe:layer+weights"])
def test_a_note_of_unknown_probes_is_refused(note: str) -> None:
    with pytest.raises(ConfigurationError, match="does not know"):
        probe_of_note(note)
