"""The bar, the best rival and the written results, from scores that were made up."""

import csv
import io
import math

import pytest

from sglang_alloc_controller.simulator.cells import Cell, Finished
from sglang_alloc_controller.simulator.results import (
    COLUMNS,
    gains_csv,
    results_csv,
    summary_markdown,
    verdicts,
)
from sglang_alloc_controller.simulator.scores import Score
from sglang_alloc_controller.simulator.timeline import Timeline

NO_TIMELINE = Timeline([], [], [], [], [], [], [], [])


def _finished(
    law: str,
    attainment_ratio: float,
    loss: float,
    *,
    scenario: str = "step",
    seed: int = 1,
    gain: float = 1.0,
    changes_per_hour: float = 4.0,
) -> Finished:
    made_up = Score(
        slo_attainment_ratio=attainment_ratio,
        mean_predicted_loss=loss,
        seconds_below_full=600.0,
        changes_per_hour=changes_per_hour,
        goodput_per_second=4.5,
        worst_minute_ratio=0.875,
        overshoot_loss=math.nan,
        settling_seconds=math.nan,
    )
    return Finished(Cell(scenario, law, seed, gain), made_up, NO_TIMELINE)


def _bar(*finished: Finished) -> str:
    """What the last column of the summary says of the only scenario."""
    (row,) = summary_markdown(verdicts(finished)).splitlines()[2:]
    return row.split("|")[6].strip()


def _rival(*finished: Finished) -> str:
    (row,) = summary_markdown(verdicts(finished)).splitlines()[2:]
    return row.split("|")[5].strip()


@pytest.mark.parametrize(
    ("attainment_ratio", "loss", "bar"),
    [
        (0.98, 0.010, "kept"),
        (0.97, 0.010, "kept"),  # one point below
        (0.9699, 0.010, "missed: attainment"),
        (0.98, 0.0126, "kept"),  # 1.25 times, and 1e-4 nats that count as the same
        (0.98, 0.01261, "missed: loss"),
        (0.9699, 0.01261, "missed: attainment; loss"),
        (1.0, 0.0, "kept"),
    ],
)
def test_the_bar_is_one_point_and_a_quarter_more_loss_than_the_oracle(
    attainment_ratio: float, loss: float, bar: str
) -> None:
    assert _bar(_finished("ours", attainment_ratio, loss), _finished("oracle", 0.98, 0.010)) == bar


@pytest.mark.parametrize(("loss", "bar"), [(0.0001, "kept"), (0.000101, "missed: loss")])
def test_a_loss_that_nobody_could_measure_is_no_more_than_none(loss: float, bar: str) -> None:
    """Nine times the oracle's, as in constant-near, is kept; a tenth of a thousandth is the edge"""
    assert _bar(_finished("ours", 0.99, 0.00009), _finished("oracle", 0.99, 0.00001)) == "kept"
    assert _bar(_finished("ours", 0.99, loss), _finished("oracle", 0.99, 0.0)) == bar


def test_without_the_oracle_nothing_is_missed_but_what_a_rival_beats() -> None:
    (found,) = verdicts([_finished("ours", 0.5, 0.4)])
    assert found.attainment_kept is None
    assert found.loss_kept is None
    assert _bar(_finished("ours", 0.5, 0.4)) == "kept"
    assert _bar(_finished("ours", 0.5, 0.4), _finished("pi", 0.6, 0.4)) == "missed: beaten by pi"


@pytest.mark.parametrize(
    ("attainment_ratio", "loss", "beaten"),
    [
        (0.9711, 0.0101, True),  # by more than a tenth of a point, at no more than 1e-4 of loss
        (0.9709, 0.0101, False),
        (0.9711, 0.01011, False),
        (1.0, 0.02, False),
        (0.9711, 0.0, True),
    ],
)
def test_a_rival_beats_ours_by_more_than_a_tenth_of_a_point_at_no_more_loss(
    attainment_ratio: float, loss: float, beaten: bool
) -> None:
    (found,) = verdicts([_finished("ours", 0.97, 0.01), _finished("aimd", attainment_ratio, loss)])
    assert found.beaten_by == (("aimd",) if beaten else ())


def test_every_rival_that_beats_ours_is_named_and_the_oracle_is_none() -> None:
    finished = [
        _finished("ours", 0.90, 0.01),
        _finished("oracle", 0.99, 0.01),
        _finished("ours-one-pair", 0.99, 0.0),
        _finished("full", 0.95, 0.0),
        _finished("gradient", 0.99, 0.01),
        _finished("floor", 1.0, 0.4),
    ]
    assert _bar(*finished) == "missed: attainment; beaten by full, gradient"


def test_the_best_rival_has_the_best_attainment_at_no_more_loss() -> None:
    ours = _finished("ours", 0.98, 0.01)
    cheap, dear = _finished("full", 0.60, 0.0), _finished("floor", 1.0, 0.4)
    assert _rival(ours, dear) == "none"
    assert _rival(ours, dear, cheap) == "full: 60.00 %, 0.00"
    at_the_edge = _finished("aimd", 0.85, 0.0101)
    assert _rival(ours, dear, cheap, at_the_edge) == "aimd: 85.00 %, 10.10"
    beyond = _finished("aimd", 0.85, 0.01011)
    assert _rival(ours, dear, cheap, beyond) == "full: 60.00 %, 0.00"


def test_an_infeasible_scenario_is_not_judged() -> None:
    ours = _finished("ours", 0.05, 0.1, scenario="infeasible")
    best = _finished("oracle", 0.9, 0.0, scenario="infeasible")
    rival = _finished("full", 0.8, 0.0, scenario="infeasible")
    assert _bar(ours, best, rival) == "infeasible: not judged"


def test_seeds_are_judged_by_their_mean() -> None:
    seeds = [
        _finished("ours", 0.96, 0.010, seed=1, changes_per_hour=2.0),
        _finished("ours", 0.98, 0.030, seed=2, changes_per_hour=8.0),
        _finished("oracle", 0.98, 0.016, seed=1),
        _finished("oracle", 0.98, 0.016, seed=2),
    ]
    (found,) = verdicts(seeds)
    assert found.means["ours"] == pytest.approx((0.97, 0.02, 5.0))
    assert found.attainment_kept
    assert found.loss_kept
    # The second seed alone loses too much.
    assert _bar(seeds[1], seeds[3]) == "missed: loss"


def test_a_scenario_without_ours_has_no_verdict() -> None:
    others = [_finished("oracle", 0.98, 0.01), _finished("full", 0.5, 0.0)]
    assert verdicts(others) == []
    both = [*others, _finished("ours", 0.9, 0.0, scenario="ramp")]
    assert [found.scenario for found in verdicts(both)] == ["ramp"]


def test_the_summary_has_a_row_for_each_scenario() -> None:
    finished = [
        _finished("ours", 0.98317, 0.007029),
        _finished("oracle", 0.984722, 0.0105423),
        _finished("full", 0.523529, 0.0),
        _finished("ours", 1.0, 0.0, scenario="constant-low"),
    ]
    assert summary_markdown(verdicts(finished)).splitlines() == [
        "| scenario | ours | oracle | full | best rival at no more loss | bar |",
        "|---|---|---|---|---|---|",
        "| step | 98.32 %, 7.03 | 98.47 %, 10.54 | 52.35 %, 0.00 | full: 52.35 %, 0.00 | kept |",
        "| constant-low | 100.00 %, 0.00 | not run | not run | none | kept |",
    ]


def test_results_have_a_row_for_each_cell_and_nothing_where_nothing_is() -> None:
    text = results_csv(
        [_finished("ours", 0.98317, 0.0070291), _finished("full", 0.05, 0.0, scenario="infeasible")]
    )
    rows = list(csv.DictReader(io.StringIO(text)))
    assert text.splitlines()[0] == ",".join(COLUMNS)
    assert rows[0] == {
        "scenario": "step",
        "law": "ours",
        "seed": "1",
        "slo_attainment_ratio": "0.98317",
        "mean_predicted_loss": "0.0070291",
        "seconds_below_full": "600",
        "changes_per_hour": "4",
        "goodput_per_second": "4.5",
        "worst_minute_ratio": "0.875",
        "overshoot_loss": "",
        "settling_seconds": "",
        "feasible": "true",
    }
    assert rows[1]["feasible"] == "false"


def test_every_number_of_a_score_is_a_column_of_the_results() -> None:
    assert ("scenario", "law", "seed", *Score._fields, "feasible") == COLUMNS


def test_gains_have_our_constant_scenarios_only() -> None:
    text = gains_csv(
        [
            _finished("ours", 0.98, 0.0038, scenario="constant-over", gain=0.5),
            _finished("ours", 0.98, 0.0061, scenario="constant-over", changes_per_hour=3.0),
            _finished("full", 0.66, 0.0, scenario="constant-over"),
            _finished("ours", 0.98, 0.007),
        ]
    )
    assert text.splitlines() == [
        "scenario,gain,seed,changes_per_hour,slo_attainment_ratio,mean_predicted_loss",
        "constant-over,0.5,1,4,0.98,0.0038",
        "constant-over,1,1,3,0.98,0.0061",
    ]
