"""``fishr analyze`` as its users meet it."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fishr.cli import main

TRAIN = ["train", "--data", "colored-digits", "--subset", "60", "--steps", "4", "--checkpoint-every", "2", "--quiet"]
DATA = ["colored-digits", "--subset", "60"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for algorithm in ("erm", "fishr"):
        assert main([*TRAIN, "--algorithm", algorithm, "--snapshots", "--output", str(folder / algorithm)]) == 0
    return folder


def test_one_model(runs, capsys):
    assert main(["analyze", str(runs / "erm"), *DATA]) == 0
    out, err = capsys.readouterr()
    assert f"{runs / 'erm'}: classifier, 129 weights" in out.replace("\n", "")
    assert "evaluation" in out
    assert "by whole Hessians" in out
    assert "by diagonals of the Hessians" in out
    assert "over its checkpoints" in out
    assert "straight line" not in out
    assert err == ""


def test_two_models_and_what_is_written(runs, tmp_path, capsys):
    output = tmp_path / "analysis"
    command = ["analyze", str(runs / "erm"), str(runs / "fishr"), *DATA, "--layers", "featurizer.1", "featurizer.3"]
    assert main([*command, "--draws", "2", "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert "featurizer.3, 16,512 weights" in out.replace("\n", "")
    assert "Hessian diagonal: Hutchinson's estimate of 2 draws, with an error of" in out
    assert "times as far apart in" in out
    content = json.loads((output / "analysis.json").read_text())
    assert [layer["layer"] for layer in content["models"][1]["layers"]] == ["featurizer.1", "featurizer.3"]
    assert [one["step"] for one in content["models"][1]["checkpoints"]] == [2, 4]
    assert pq.read_table(output / "weights.parquet").num_rows == 2 * 4 * (129 + 16_512 + 16_512)
    assert {path.name for path in output.iterdir()} == {"analysis.json", "weights.parquet", "figures.html"}


def test_figures_as_files(runs, tmp_path, browser):
    command = ["analyze", str(runs / "erm" / "model"), *DATA, "--output", str(tmp_path), "--figures", "svg"]
    assert main(command) == 0
    assert {path.name for path in tmp_path.glob("*.svg")} == {"distances.svg", "curvature.svg"}


def test_json_on_stdout(runs, capsys):
    assert main(["analyze", str(runs / "fishr"), *DATA, "--json", "--plane"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["models"][0]["roles"]["-90%"] == "held out"
    assert set(content["models"][0]["plane"]["risks"]) == set(content["models"][0]["head"]["domains"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--figures", "png"], "--figures needs --output, the folder for them"),
        (["--plane"], "--plane needs --output or --json: it is a matrix, or a figure"),
        (["--figures", "gif", "--output", "x"], "--figures must be png or svg, got 'gif'"),
        (["--layers", "featurizer.9"], "unknown layer 'featurizer.9'; did you mean"),
        (["--layers", "featurizer.1", "--memory", "0"], "memory must be at least 1 MiB and draws at least 2"),
    ],
)
def test_wrong_arguments(runs, capsys, arguments, message):
    assert main(["analyze", str(runs / "erm"), *DATA, *arguments]) == 2
    assert f"fishr: error: {message}" in " ".join(capsys.readouterr().err.split())


def test_three_models(runs, capsys):
    assert main(["analyze", *[str(runs / "erm")] * 2, str(runs / "fishr"), *DATA]) == 2
    assert "give one model, or two different ones" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(runs, tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert main(["analyze", str(runs / "erm"), *DATA, "--output", str(tmp_path / "taken")]) == 2
    assert capsys.readouterr().err.startswith("fishr: error: ")


def test_snapshots_of_a_run_that_is_done(tmp_path, capsys):
    command = [*TRAIN, "--algorithm", "erm", "--output", str(tmp_path / "run")]
    assert main(command) == 0
    assert main([*command, "--snapshots"]) == 2
    assert "is done and kept no snapshots" in capsys.readouterr().err
