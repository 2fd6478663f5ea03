"""Hot reload: what changed takes effect, what is wrong changes nothing, last good stays."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import structlog
import yaml
from structlog.testing import capture_logs
from virtual_loop import SLO, VirtualController, publish_table

from sglang_alloc.errors import ConfigurationError
from sglang_alloc_controller.config_follower import ConfigFollower, ReloadOutcome
from sglang_alloc_controller.settings import Settings, load_settings


class ConfigFile:
    """A configuration that the test rewrites, and its follower."""

    def __init__(self, path: Path, table: Path = Path("t.tbl")) -> None:
        self.path = path
        self._content: dict[str, Any] = {"table": str(table), "slo": SLO}
        self.write()
        self.settings = load_settings(path)
        self.follower = ConfigFollower(path, self.settings)

    def write(self, **sections: Any) -> None:
        self._content |= sections
        # Renamed into place, so that two writes in one clock tick differ by their inode.
        fresh = self.path.with_suffix(".new")
        fresh.write_text(yaml.safe_dump(self._content))
        fresh.replace(self.path)

    def follow(self) -> tuple[ReloadOutcome, Settings] | None:
        return self.follower.follow(lambda settings: None)

    def settle(self) -> tuple[ReloadOutcome, Settings]:
        """Follow until the change has looked the same twice."""
        assert self.follow() is None
        found = self.follow()
        assert found is not None
        return found


@pytest.fixture
def file(tmp_path: Path) -> ConfigFile:
    return ConfigFile(tmp_path / "c.yaml")


def test_nothing_is_read_while_the_file_stays(file: ConfigFile) -> None:
    assert [file.follow() for _ in range(3)] == [None, None, None]


def test_a_change_takes_effect_once_it_has_looked_the_same_twice(file: ConfigFile) -> None:
    file.write(mode="shadow")
    outcome, settings = file.settle()
    assert outcome.applied
    assert "mode changed" in outcome.sentence
    assert settings.mode == "shadow"
    assert file.follow() is None


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"mode": "auto"}, "mode is 'auto'"),
        ({"tabel": 1}, "tabel is not a setting"),
        ({"table": "other.tbl", "mode": "shadow"}, "table changed, which takes effect only in a"),
        ({"http": {"port": 1}}, "http changed"),
    ],
)
def test_what_is_wrong_is_refused_as_a_whole(
    file: ConfigFile, sections: dict[str, Any], sentence: str
) -> None:
    file.write(**sections)
    outcome, settings = file.settle()
    assert not outcome.applied
    assert sentence in outcome.sentence
    assert settings == file.settings
    assert file.follow() is None


def test_a_deleted_file_keeps_the_last_good_settings(file: ConfigFile) -> None:
    file.path.unlink()
    outcome, settings = file.settle()
    assert not outcome.applied
    assert settings == file.settings
    file.write(mode="shadow")
    assert file.settle()[1].mode == "shadow"


def test_what_does_not_fit_the_server_is_refused(file: ConfigFile) -> None:
    def accept(settings: Settings) -> None:
        raise ConfigurationError("Not an edge.")

    file.write(mode="shadow")
    assert file.follower.follow(accept) is None
    found = file.follower.follow(accept)
    assert found is not None
    assert found[0] == ReloadOutcome(False, "Not an edge.")


def test_a_configmaps_symlink_swap_is_a_change(tmp_path: Path) -> None:
    """The kubelet points `..data` at a new folder; the file's own link never changes."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        mode = "control" if name == "one" else "shadow"
        text = yaml.safe_dump({"table": "t.tbl", "slo": SLO, "mode": mode})
        (tmp_path / name / "c.yaml").write_text(text)
    (tmp_path / "..data").symlink_to("one")
    path = tmp_path / "c.yaml"
    path.symlink_to("..data/c.yaml")
    follower = ConfigFollower(path, load_settings(path))
    (tmp_path / "..tmp").symlink_to("two")
    os.replace(tmp_path / "..tmp", tmp_path / "..data")
    assert follower.follow(lambda settings: None) is None
    found = follower.follow(lambda settings: None)
    assert found is not None
    assert found[1].mode == "shadow"


def test_a_request_reads_the_file_at_the_next_tick_and_gets_the_outcome(file: ConfigFile) -> None:
    outcomes: list[ReloadOutcome] = []
    asking = threading.Thread(target=lambda: outcomes.append(file.follower.ask(30.0)))
    asking.start()
    while file.follow() is None:
        asking.join(0.01)
    asking.join(30.0)
    assert outcomes[0].applied
    assert "nothing changed" in outcomes[0].sentence


def test_a_request_that_no_tick_takes_says_so(file: ConfigFile) -> None:
    assert not file.follower.ask(0.01).applied


def _followed(tmp_path: Path) -> tuple[ConfigFile, VirtualController]:
    publish_table(tmp_path / "t.tbl")
    file = ConfigFile(tmp_path / "c.yaml", tmp_path / "t.tbl")
    return file, VirtualController(file.settings, follow_config=file.follower.follow)


def test_the_loop_takes_new_bounds_and_counts_the_reload(tmp_path: Path) -> None:
    file, controller = _followed(tmp_path)
    controller.tick()
    file.write(quality={"prefill_ceiling_budget": 30})
    controller.tick()
    assert controller.tick()[1:] == (30, 48)
    assert controller.metric("config_reloads_total", outcome="applied") == 1
    file.write(quality={"prefill_ceiling_budget": 999})
    controller.tick()
    assert controller.tick()[1:] == (30, 48)
    assert controller.metric("config_reloads_total", outcome="refused") == 1
    assert controller.metric("config_last_reload_successful") == 0


def test_a_reload_to_fixed_and_back_goes_on_from_the_budgets_in_force(tmp_path: Path) -> None:
    file, controller = _followed(tmp_path)
    file.write(mode="fixed", fixed={"prefill_budget": 20, "decode_budget": 21})
    controller.tick()
    assert controller.tick()[1:] == (20, 21)
    file.write(mode="control")
    controller.tick()
    assert controller.tick()[1:] == (20, 21)
    assert controller.metric("mode", mode="control") == 1


def test_a_table_that_does_not_fit_the_reloaded_settings_is_left_alone(tmp_path: Path) -> None:
    """It fits those of the start; in force are the others."""
    file, controller = _followed(tmp_path)
    controller.tick()
    file.write(quality={"prefill_floor_budget": 30}, mode="control")
    controller.tick()
    controller.tick()
    first = controller.link.table.publication_id
    publish_table(tmp_path / "t.tbl", top_k=4)  # full is 24 there
    structlog.reset_defaults()  # the fixture that silences logs puts them back afterwards
    with capture_logs() as logs:
        assert controller.tick()[1:] == (48, 48)
        assert controller.tick()[1:] == (48, 48)
    assert controller.link.table.publication_id == first
    assert [line["event"] for line in logs] == ["table_unusable"]
    assert controller.metric("budget_floor_activations", phase="prefill") == 30
    publish_table(tmp_path / "t.tbl", top_k=6)
    assert controller.tick()[1:] == (36, 36)
    assert controller.metric("budget_floor_activations", phase="prefill") == 30
