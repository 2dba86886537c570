import json
from pathlib import Path

import pytest

from fishr.cli import main


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
