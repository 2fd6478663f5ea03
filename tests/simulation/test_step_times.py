"""Step times from a bench CSV, and between the measured points."""

from pathlib import Path

import pytest
from small_worlds import make_times

from sglang_alloc.errors import ConfigurationError
from sglang_alloc_controller.bench_csv import DEFAULT_BENCH, read_step_times
from sglang_alloc_controller.step_times import PhaseTimes

HEAD = "phase,concurrency,budget,median_ms,prefill_prompt_tokens"


def _write(path: Path, *rows: str, head: str = HEAD) -> Path:
    path.write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    return path


def test_times_between_measured_points_lie_on_straight_lines() -> None:
    times = make_times()
    assert times.prefill.at(150, 10) == pytest.approx(0.15)
    assert times.prefill.at(150, 7.5) == pytest.approx(0.1125)


def test_beyond_the_measured_sizes_the_slope_goes_on_and_budgets_end() -> None:
    times = make_times()
    assert times.prefill.at(400, 10) == pytest.approx(0.4)
    assert times.prefill.at(400, 99) == pytest.approx(0.4)
    assert times.prefill.at(1, 10) == pytest.approx(0.02)


def test_below_the_measured_sizes_a_step_costs_at_least_its_proportion() -> None:
    """Four times the tokens take six times as long here: the slope would reach nothing."""
    times = PhaseTimes((4096.0, 16384.0), (5, 10), ((0.05, 0.1), (0.3, 0.6)))
    assert times.at(2048, 10) == pytest.approx(0.05)
    assert times.at(2048, 5) == pytest.approx(0.025)
    assert times.at(100, 10) == pytest.approx(0.02)
    assert times.at(8192, 10) == pytest.approx(0.1 + 0.5 / 3)


def test_a_gain_changes_what_the_budget_does_and_not_the_full_time() -> None:
    scaled = make_times().scaled(0.5)
    assert scaled.decode.at(1, 10) == pytest.approx(0.01)
    assert scaled.decode.at(1, 5) == pytest.approx(0.0075)


def test_a_bench_without_a_stock_server_is_read_as_it_is(tmp_path: Path) -> None:
    bench = _write(
        tmp_path / "b.csv",
        *("prefill,1,4,10,100", "prefill,1,8,20,100", "prefill,4,4,40,100", "prefill,4,8,80,100"),
        *("decode,1,4,3,100", "decode,1,8,5,100"),
    )
    times = read_step_times(bench)
    assert times.prefill.at(100, 8) == pytest.approx(0.02)
    assert times.prefill.at(400, 4) == pytest.approx(0.04)
    assert times.decode.at(7, 8) == pytest.approx(0.005)


def test_a_bench_beside_stock_takes_full_from_stock_and_the_rest_from_the_ratios(
    tmp_path: Path,
) -> None:
    rows = ("{},1,4,999,100,10,0.6", "{},1,8,999,100,12,1.2")
    bench = _write(
        tmp_path / "b.csv",
        *(row.format(phase) for phase in ("prefill", "decode") for row in rows),
        head=HEAD + ",stock_median_ms,ratio_to_stock",
    )
    decode = read_step_times(bench).decode
    assert decode.at(1, 8) == pytest.approx(0.011)
    assert decode.at(1, 4) == pytest.approx(0.0055)


def test_the_shipped_bench_can_be_read() -> None:
    times = read_step_times(DEFAULT_BENCH)
    assert times.prefill.ratio(2048, 5) < 0.8
    assert times.decode.ratio(8, 5) < 0.8


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ((), "lacks phase"),
        (("decode,1,4,3,100",), "prefill"),
        (("decode,1,4,x,100", "prefill,1,4,3,100"), "no result"),
        (("decode,1,4,3,100", "prefill,1,4,3,100", "prefill,1"), "no result"),
        (("decode,1,4,3,1", "decode,2,8,3,1", "prefill,1,4,3,1"), "missing"),
        (("prefill,1,4,3,1", "decode,1,4"), "no result"),
        (("prefill,1,4,3,1", "decode"), "no result"),
        (("prefill,1,4,3,1", "decode,1,4,nan,1"), "budget 4 takes nan s"),
        (("prefill,1,4,1e999,1", "decode,1,4,3,1"), "budget 4 takes inf s"),
        (("prefill,1,4,3,1", "decode,1,4,-3,1"), "a decode step of size 1 at"),
        (("prefill,1,4,3,1", "decode,0,4,3,1"), "a decode step of size 0 at"),
        (("prefill,1,4,3,nan", "decode,1,4,3,1"), "a prefill step of size nan at"),
    ],
)
def test_a_bench_that_cannot_be_used_is_refused(
    tmp_path: Path, rows: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        read_step_times(_write(tmp_path / "b.csv", *rows))


@pytest.mark.parametrize("number", ["nan", "inf", "0", "-1"])
@pytest.mark.parametrize("column", ["median_ms", "prefill_prompt_tokens"])
def test_a_size_or_a_time_that_is_not_above_zero_is_refused(
    tmp_path: Path, column: str, number: str
) -> None:
    row = {"median_ms": "3", "prefill_prompt_tokens": "100"} | {column: number}
    bench = _write(tmp_path / "b.csv", "decode,1,4,3,100", ",".join(["prefill,1,4", *row.values()]))
    with pytest.raises(ConfigurationError, match=r"no result.*numbers above zero belong"):
        read_step_times(bench)


def test_a_ratio_to_stock_of_nothing_is_refused(tmp_path: Path) -> None:
    rows = (f"{phase},1,4,3,100,10,0" for phase in ("prefill", "decode"))
    bench = _write(tmp_path / "b.csv", *rows, head=HEAD + ",stock_median_ms,ratio_to_stock")
    with pytest.raises(ConfigurationError, match="no result"):
        read_step_times(bench)


def test_a_bench_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as refused:
        read_step_times(tmp_path / "none.csv")
    assert str(refused.value) == (
        f"The bench {tmp_path / 'none.csv'} cannot be read: No such file or directory. Give the "
        "CSV that `sglang-alloc bench` or `sglang-alloc-controller advise --output` wrote."
    )
