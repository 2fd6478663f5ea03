"""The live page in a real browser, served by a real controller."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ahead import write_cost_model
from controller_process import ControllerProcess, running, write_config
from stand_in_server import serving
from virtual_loop import publish_table

from sglang_alloc.shared_table import (
    CalmBudgets,
    CalmTokens,
    SelectorWriter,
    SharedTable,
    WorkerCounters,
)
from sglang_alloc_controller.law_state import Reason

PAGE = Path(__file__).parents[2] / "controller" / "sglang_alloc_controller" / "live_page.html"
_BROWSER = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    "--virtual-time-budget=2500",  # of the page's own time: two rounds of data
)


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControllerProcess]:
    folder = tmp_path_factory.mktemp("page")
    publish_table(folder / "t.tbl")
    recorded = Path(__file__).parent / "recorded"
    with serving((recorded / "first.txt").read_text()) as server:
        quality = {"below_full_minutes": 30.0}
        law = {"calm_budgets": False}
        config = write_config(folder, server.url, quality=quality, law=law)
        with running(config) as controller, SharedTable.open(folder / "t.tbl") as table:
            controller.wait_for(lambda: controller.is_in_state("valid"), "valid input")
            server.page = (recorded / "burst.txt").read_text()
            controller.wait_for(lambda: max(table.selector()[1:]) < 48, "a lower budget")
            controller.order("/override", prefill=9, seconds=600, actor="<b>eve</b>")
            controller.wait_for(lambda: "<b>eve" in _history(controller), "the override")
            yield controller


def _history(controller: ControllerProcess) -> str:
    return controller.get("/history.json").text


def _browse(*arguments: str) -> subprocess.CompletedProcess[str]:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.fail("chromium is missing: run `make tools`", pytrace=False)
    command = [browser, *_BROWSER, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


@pytest.fixture(scope="module")
def calm_controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControllerProcess]:
    """A controller that found calm budgets; three of four tokens were served at them."""
    folder = tmp_path_factory.mktemp("calm")
    publish_table(folder / "t.tbl")
    quality = {"cost_model": write_cost_model(folder / "cost.csv")}
    recorded = Path(__file__).parent / "recorded"
    with (
        serving((recorded / "first.txt").read_text()) as server,
        SharedTable.open(folder / "t.tbl") as table,
    ):
        with SelectorWriter.acquire(table) as writer:
            writer.write(20, 30, CalmBudgets(48, 41, 9))
        config = write_config(folder, server.url, quality=quality, law={"levels_max": 43})
        with running(config) as controller:
            controller.wait_for(lambda: controller.is_in_state("valid"), "valid input")
            slot = table.worker_slot(0)
            slot.store(WorkerCounters(pid=1), CalmTokens(300, 400, 30, 40))
            controller.wait_for(
                lambda: '"calm_share":[0.75,0.75]' in _history(controller), "shares"
            )
            yield controller
            del slot


@pytest.fixture(scope="module")
def dom(controller: ControllerProcess, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page as the browser has it after its scripts ran; its messages come after it."""
    return _page(controller, tmp_path_factory.mktemp("profile"))


@pytest.fixture(scope="module")
def calm_dom(calm_controller: ControllerProcess, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same of a controller with calm budgets."""
    return _page(calm_controller, tmp_path_factory.mktemp("calm_profile"))


def _page(controller: ControllerProcess, folder: Path) -> str:
    profile = f"--user-data-dir={folder}"
    seen = _browse(profile, "--enable-logging=stderr", "--dump-dom", controller.page_url)
    return seen.stdout + "".join(line for line in seen.stderr.splitlines(True) if "CONSOLE" in line)


def test_it_shows_state_mode_and_every_tile(dom: str) -> None:
    assert re.search(r'id="mode"[^>]*>control<', dom)
    assert re.search(r'id="state"[^>]*>valid<', dom)
    names = re.findall(r'class="name">([^<]+)<', dom)
    assert names[:4] == ["prefill budget", "decode budget", "TTFT within SLO", "ITL within SLO"]
    assert "of 30 agreed" in dom


def test_it_draws_budget_ratios_queue_and_reasons_over_time(dom: str) -> None:
    for title in ("Budget, activations per token", "Within the SLO", "Requests", "Reasons"):
        assert f'aria-label="{title}"' in dom
    drawn = re.findall(r'<path class="trace [a-z]*"[^>]* d="(M[^"]+)"', dom)
    assert len(drawn) >= 6
    assert not re.search(
        r"NaN|undefined|Infinity", dom.split("<main>")[1].split("<script>", maxsplit=1)[0]
    )
    assert len(re.findall(r'<rect [^>]*style="fill: var\(--', dom)) >= 2


def test_it_says_that_an_override_is_in_force_and_takes_its_actor_for_text(dom: str) -> None:
    assert re.search(r'id="banner" role="status" class="warn">An override is in force, by', dom)
    assert "&lt;b&gt;eve&lt;/b&gt;" in dom
    assert "<b>eve" not in dom


def test_it_shows_what_calm_steps_obey_beside_the_budgets(calm_dom: str) -> None:
    tiles = dict(re.findall(r'class="name">([^<]+)<.*?class="note">([^<]*)<', calm_dom))
    assert tiles["prefill budget"].startswith("48 in calm steps, ")
    assert tiles["decode budget"].startswith("41 in calm steps, ")
    assert tiles["tokens in calm steps"] == "nobody waits, under 9 run; prefill / decode"
    assert ">75 % / 75 %<" in calm_dom
    # Decode loses more: a quarter of the tokens at 30, the others at 41 activations of 48.
    loss = 0.25 * 0.2 * 18 / 42 + 0.75 * 0.2 * 7 / 42
    prefill_loss = 0.25 * 0.2 * 28 / 42
    assert f">{max(loss, prefill_loss):.4f}<" in calm_dom
    bands = re.findall(r'<path class="band"[^>]* d="(M[^"]+Z)"', calm_dom)
    assert len(bands) == 2
    assert len(re.findall(r'<path class="trace calm"[^>]* d="(M[^"]+)"', calm_dom)) == 2


def test_without_calm_budgets_it_shows_none(dom: str) -> None:
    assert not re.search(r'<path class="(band|trace calm)"[^>]* d="M', dom)
    assert not re.search(r'class="note">[^<]*in calm steps', dom)
    assert ">\u2013 / \u2013<" in dom


@pytest.mark.parametrize("page", ["dom", "calm_dom"])
def test_its_scripts_report_no_error(page: str, request: pytest.FixtureRequest) -> None:
    assert "CONSOLE" not in request.getfixturevalue(page)


def test_it_has_a_group_for_every_reason_that_does_not_wait() -> None:
    groups = PAGE.read_text(encoding="utf-8").split("const GROUPS", 1)[1].split("};", 1)[0]
    grouped = re.findall(r'"(\w+)"', groups.replace('"waiting"', ""))
    waiting = {
        *(Reason.HOLD, Reason.DEADBAND, Reason.DRAINING, Reason.TOO_FEW_SAMPLES),
        *(Reason.BACKOFF, Reason.PREDICTED_VIOLATION),
    }
    assert sorted(grouped) == sorted(reason.value for reason in {*Reason} - waiting)


def test_it_brings_everything_along_and_may_fetch_nothing_else(
    controller: ControllerProcess,
) -> None:
    text = PAGE.read_text(encoding="utf-8")
    outside = set(re.findall(r"https?://[^\"'\s)]+", text)) - {"http://www.w3.org/2000/svg"}
    assert outside == set()
    assert not re.search(r"<(script|link|img|iframe)[^>]*\b(src|href)=(?!\"data:,\")", text)
    answer = controller.get("/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["content-type"].startswith("text/html")


def test_a_picture_of_it_is_not_blank_in_light_and_dark(
    controller: ControllerProcess, tmp_path: Path
) -> None:
    sizes = []
    for scheme in ("1", "0"):  # 0 is dark
        shot = tmp_path / f"{scheme}.png"
        _browse(
            f"--user-data-dir={tmp_path / scheme}",
            f"--blink-settings=preferredColorScheme={scheme}",
            "--window-size=1200,1200",
            f"--screenshot={shot}",
            controller.page_url,
        )
        sizes.append(shot.read_bytes())
    # An empty page of this size compresses to some 5 kB.
    assert all(len(picture) > 30_000 for picture in sizes)
    assert sizes[0] != sizes[1]
