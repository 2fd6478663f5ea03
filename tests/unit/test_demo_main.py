"""The demo's command line: what it needs, what it says, how it exits."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_alloc.demo import __main__ as demo
from sglang_alloc.demo.controller_process import controller_settings
from sglang_alloc.demo.load_plan import Slo
from sglang_alloc.server_runs.interruption import sigterm_interrupts
from sglang_alloc_controller.settings import parse_settings


def test_missing_tables_end_the_demo_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words " * 500)
    arguments = ["--model", str(tmp_path), "--text", str(text), "--out", str(tmp_path / "out")]
    assert demo.main(arguments) == demo.FAILED
    out = capsys.readouterr().out
    assert "The demo stopped:" in out
    assert "budget table" in out


def test_unreadable_text_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "café.txt"
    assert demo.main(["--text", str(missing), "--out", str(tmp_path)]) == demo.FAILED
    assert "café.txt" in capsys.readouterr().out.replace("\n", "")


def test_an_interrupted_demo_says_what_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupted)
    (tmp_path / "full.jsonl").write_text("{}\n")
    text = tmp_path / "text.txt"
    text.write_text("words")
    assert demo.main(["--text", str(text), "--out", str(tmp_path)]) == demo.INTERRUPTED
    out = capsys.readouterr().out
    assert "Interrupted" in out
    assert "full.jsonl" in out


def test_the_demos_configuration_is_valid_for_the_controller(tmp_path: Path) -> None:
    settings = controller_settings(
        table=tmp_path / "t.tbl",
        server_url="http://127.0.0.1:30000",
        slo=Slo(ttft_seconds=1.25, itl_seconds=0.08),
        floor_budget=13,
        decision_log=tmp_path / "decisions.jsonl",
        port=9464,
    )
    parsed = parse_settings(settings)
    assert parsed.slo.ttft_seconds == 1.25
    assert parsed.quality.prefill_floor_budget == 13


def test_sigterm_unwinds_like_ctrl_c_and_only_within_the_block() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_interrupts():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("program", ["demo", "bench"])
def test_a_client_needs_neither_torch_nor_sglang(program: str) -> None:
    code = (
        f"import sys, sglang_alloc.{program}.__main__\n"
        "sys.exit(bool({'torch', 'sglang', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
