"""``--track``, as far as commands hand it on."""

import json
from pathlib import Path

import pytest

from fishr.cli import main
from tracked_runs import NOLOAD, keep_trackers_local, mlflow_points, mlflow_run, tensorboard_points

TRAIN = ["train", "--data", "colored-digits", "--algorithm", "erm", "--subset", "40", "--steps", "10", "--quiet"]


pytestmark = pytest.mark.filterwarnings(NOLOAD)


@pytest.fixture(autouse=True)
def _local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_trackers_local(monkeypatch, tmp_path / "of-trackers")


def test_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main([*TRAIN, "--track", "tensorboard", "--output", str(run), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    accuracy = json.loads(captured.out)["accuracy"]["-90%"]["out"]
    assert tensorboard_points(run)["kept/accuracy/-90%/out"] == [(10, pytest.approx(accuracy))]


def test_demo_and_compare(tmp_path: Path) -> None:
    demo, compared = tmp_path / "demo", tmp_path / "compared"
    assert main(["demo", "--seeds", "1", "--steps", "10", "--output", str(demo), "--track", "tensorboard"]) == 0
    assert all("seconds_per_step" in tensorboard_points(demo / name) for name in ("erm-0", "fishr-0"))
    arguments = ["--subset", "60", "--draws", "1", "--seeds", "1", "--steps", "5", "--quiet"]
    assert main(["compare", "colored-digits", *arguments, "--output", str(compared), "--track", "tensorboard"]) == 0
    runs = list((compared / "runs").iterdir())
    assert len(runs) == 7
    assert all("seconds_per_step" in tensorboard_points(run) for run in runs)


def test_the_processes_of_a_sweep_share_a_database(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what trackers write is not taken for runs."""
    sweep = tmp_path / "sweep"
    arguments = [
        *("--datasets", "colored-digits", "--algorithms", "erm", "fishr", "--test-domain", "-90%", "--subset", "60"),
        *("--draws", "1", "--trials", "1", "--steps", "8", "--checkpoint-every", "4", "--slots", "2", "--keep-models"),
    ]
    assert main(["sweep", "run", *arguments, "--output", str(sweep), "--track", "mlflow"]) == 0
    runs = [path.parent for path in sweep.glob("runs/*/DONE")]
    assert [mlflow_run(run).info.status for run in runs] == ["FINISHED", "FINISHED"]
    assert all([step for step, _ in mlflow_points(run)["train/loss"]] == [4, 8] for run in runs)
    assert len(list(sweep.rglob("model.safetensors"))) == 4
    capsys.readouterr()
    assert main(["report", str(sweep), "--format", "json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""


@pytest.mark.parametrize(
    "command",
    [
        TRAIN,
        ["demo"],
        ["compare", "colored-digits"],
        ["reproduce", "colored-mnist"],
        ["sweep", "run", "--datasets", "colored-digits", "--algorithms", "erm"],
    ],
    ids=lambda command: command[0],
)
def test_an_unknown_tracker_is_found_before_anything_is_done(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--track", "tensorbord"]) == 2
    assert capsys.readouterr().err.startswith("fishr: error: unknown tracker 'tensorbord'; did you mean 'tensorboard'?")
    assert not list(tmp_path.iterdir())
