"""``fishr compare`` from the command line."""

import json
from pathlib import Path

import pytest

from fishr.cli import main
from fishr.models import load_model
from small_runs import write_pictures

DIGITS = ["compare", "colored-digits", "--subset", "60", "--draws", "1", "--seeds", "2", "--steps", "8"]


def call(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_the_comparison_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*DIGITS, "--algorithms", "fishr", "vrex", "--output", tmp_path / "out") == 0
    printed = capsys.readouterr()
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert list(results["accuracies"]) == ["erm", "fishr", "vrex"]
    assert results["verdict"]["sentence"] in printed.out
    assert "On a domain like these that it has not seen, expect of" in printed.out
    for title in ("ERM", "Fishr", "V-REx"):
        assert f"| {title} " in printed.out
    assert load_model(tmp_path / "out/model").card.provenance["train_domains"] == ["+80%", "+90%", "-90%"]
    lines = printed.err.splitlines()
    assert lines[:3] == [f"measuring how long a run of {title} takes" for title in ("ERM", "Fishr", "V-REx")]
    first = lines.pop(3)
    assert first.startswith("19 runs: 1 draw, 2 seeds, 8 steps; about ")
    assert "as measured (a step of ERM " in first
    assert sum(line[0].isdigit() for line in lines) == 19
    assert lines[4].lstrip().startswith("2 Fishr, held out +80%, draw 0, seed 0: +80% ")

    assert call(*DIGITS, "--algorithms", "fishr", "vrex", "--output", tmp_path / "out") == 0
    printed = capsys.readouterr()
    assert printed.err.count("(done before)") == 19
    assert f"All runs were done before; to make them anew, delete {tmp_path / 'out'}." in printed.out


def test_json_and_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*DIGITS, "--output", tmp_path / "out", "--json", "--quiet") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads((tmp_path / "out/results.json").read_text())
    assert all(line.startswith("fishr: hint, one of ") for line in printed.err.splitlines())


def test_pictures_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FISHR_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    pictures = write_pictures(tmp_path / "pictures", each=4)
    network = ["--backbone", "resnet10t", "--no-pretrained", "--image-size", 32, "--batch-size", 2]
    extent = ["--draws", 2, "--seeds", 1, "--steps", 2]
    assert call("compare", pictures, *network, *extent, "--algorithms", "erm", "--device", "cpu") == 0
    results = json.loads((tmp_path / "runs/compare-pictures/results.json").read_text())
    assert list(results["accuracies"]["erm"]) == ["lab", "shop", "street"]
    assert results["verdict"]["sentence"] == "Undecided: ERM was compared with nothing."
    assert "7 runs: 2 draws, 1 seed, 2 steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "soon"], "a budget is a time such as 2h, 1h30m or 90min, got 'soon'"),
        (["--budget", "0.001s"], "the budget of 0 s is too short: the minimum (1 draw, 2 seeds, 8 steps) takes about"),
        (["--algorithms", "fisher"], "unknown algorithm 'fisher'"),
        (["--select-by", "test"], "select_by must be one of training, leave-one-out, got 'test'"),
        (["--select-by", "leave-one-out"], "erm, fishr can be compared on 4 domains or more, as"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*DIGITS, "--output", tmp_path / "out", *arguments) == 2
    *before, line = capsys.readouterr().err.splitlines()
    assert all(said.startswith("measuring how long") for said in before)
    assert line.startswith(f"fishr: error: {message}")
