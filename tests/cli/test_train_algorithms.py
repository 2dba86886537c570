"""Every algorithm trains, evaluates and ships its model from the command line."""

import json
from pathlib import Path

import pytest

from fishr.algorithms import ALGORITHMS
from fishr.cli import main
from fishr.models import load_model
from fishr.records import read_records

TRAIN = ("train", "--data", "colored-digits", "--subset", "40", "--steps", "12", "--batch-size", "16", "--quiet")


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_every_algorithm_trains_on_colored_digits(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twelve steps: past every switch-on, so that a penalty, if there is one, has its weight at the end."""
    assert main([*TRAIN, "--algorithm", name, "--output", str(tmp_path / "run"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["step"] == 12
    assert set(printed["accuracy"]) == {"+80%", "+90%", "-90%", "gray"}
    *_, last = read_records(tmp_path / "run" / "metrics.jsonl")
    assert last.losses.get("penalty_weight", 1.0) > 0
    assert load_model(tmp_path / "run").card.provenance["config"]["algorithm"] == name


@pytest.mark.parametrize("name", ["arm", "mtl"])
def test_a_model_that_adapts_to_the_batch_is_evaluated_but_not_exported(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    assert main([*TRAIN, "--algorithm", name, "--output", run]) == 0
    assert main(["evaluate", run, "colored-digits"]) == 0
    assert "depends on the batch" in (tmp_path / "run" / "model" / "README.md").read_text()
    capsys.readouterr()
    assert main(["export", run, "--output", str(tmp_path / "model.onnx")]) == 2
    said = capsys.readouterr().err
    assert "the model cannot be exported: it adapts to the domain of a batch" in said
    assert not (tmp_path / "model.onnx").exists()


def test_a_model_that_does_not_says_nothing_of_it(tmp_path: Path) -> None:
    assert main([*TRAIN, "--algorithm", "erm", "--output", str(tmp_path / "run")]) == 0
    assert "depends on the batch" not in (tmp_path / "run" / "model" / "README.md").read_text()
