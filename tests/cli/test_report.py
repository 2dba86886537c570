import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest

from fishr.cli import main
from runs_to_show import write_run


def test_tables_go_to_stdout(domainbed_sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(domainbed_sweep)]) == 0
    said = capsys.readouterr()
    assert "pacs, training-domain validation" in said.out
    assert "83.3 ± 9.9  62.1 ± 2.5" in said.out
    assert said.err == ""


def test_all_selection_rules(domainbed_sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(domainbed_sweep), "--selection", "all", "--format", "json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["training", "leave-one-out", "oracle"]


def test_a_fixed_config_is_draw_0(domainbed_sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(domainbed_sweep), "--fixed-config"]) == 0
    said = capsys.readouterr().out
    assert "all trials have the hyperparameters of draw 0" in said
    assert "best hyperparameter draw" not in said
    assert "draws" not in said


def test_folders_that_count_for_nothing_are_named_once_for_each_reason(
    domainbed_sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.jsonl").touch()
    assert main(["report", str(domainbed_sweep), str(tmp_path)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fishr: warning: 2 of the folders left out")
    assert line.endswith("no records yet")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--selection", "train"], "unknown selection rule 'train'; did you mean 'training'?"),
        (["--format", "tex"], "unknown format 'tex'; did you mean 'text'?"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, domainbed_sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(domainbed_sweep), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/results.jsonl").touch()
    assert main(["report", str(tmp_path)]) == 2
    assert "there is nothing to report: no run has a record" in capsys.readouterr().err


def test_runs_of_no_sweep_are_shown_by_the_page_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs/swept")
    write_run(tmp_path / "runs/alone", draw=None)
    assert main(["report", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().err == (
        "fishr: 1 runs are of no sweep and left out of the tables: fishr report --html shows them\n"
    )
    assert main(["report", str(tmp_path / "runs/alone")]) == 2
    assert "there is nothing to report: no run of a sweep has a record" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "runs/alone"), "--html", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"Report: {tmp_path / 'page.html'}\n"
    assert "50.0 % on west, held out" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_page_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--html", str(tmp_path / "page.html")], ["--html", "x", "--serve"]):
        assert main(["report", str(tmp_path), *arguments]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert f"there is no run in {tmp_path}" in first
    assert "--html writes the page, --serve shows it: give one of them" in second
    assert not (tmp_path / "page.html").exists()


def test_serve_until_interrupted(tmp_path: Path) -> None:
    write_run(tmp_path / "run", draw=None)
    command = [sys.executable, "-m", "fishr.cli", "report", str(tmp_path), "--serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
        with urlopen(address) as answer:
            assert "50.0 % on west, held out" in answer.read().decode()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
        assert process.stderr.read() == ""


def test_serve_what_cannot_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "none"), "--serve"]) == 2
    assert f"{tmp_path / 'none'} is no folder: give folders with runs in them" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["report", str(tmp_path), "--serve", "--port", str(port)]) == 2
    assert f"port {port} cannot be used (Address already in use): give another --port" in capsys.readouterr().err
