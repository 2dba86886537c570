"""``fishr train --devices``: several processes train one run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import Adam

from fishr.cli import main
from fishr.errors import ConfigError
from fishr.records import read_records
from fishr.training.ranks import Ranks
from leaving import LEAVES_AFTER, MARK
from small_runs import write_pictures

STEPS = 12
DIGITS = ["--data", "colored-digits", "--set", "switch_on=4", "penalty_weight=1000"]
COMMON = ["--steps", str(STEPS), "--checkpoint-every", "4", "--batch-size", "7", "--device", "cpu", "--seed", "3"]


def train(output: Path, *more: str) -> list[str]:
    return ["train", *COMMON, *more, "--output", str(output)]


def run(command: list[str], mark: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as processes that it starts run the same command line."""
    tests = Path(__file__).parents[1]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests), MARK: str(mark)}
    return subprocess.run(
        [sys.executable, "-m", "fishr.cli", *command], env=variables, capture_output=True, text=True, timeout=300
    )


def assert_same_run(folder: Path, expected: Path) -> None:
    """Records and weights; single ones, whose gradient is nothing but rounding, Adam may move at will."""
    weights, expected_weights = (load_file(path / "model" / "model.safetensors") for path in (folder, expected))
    assert weights.keys() == expected_weights.keys()
    values, others = (torch.cat([each[name].flatten() for name in weights]) for each in (weights, expected_weights))
    assert (values - others).norm() < 1e-5 * others.norm()
    records, expected_records = (read_records(path / "metrics.jsonl") for path in (folder, expected))
    assert [record.step for record in records] == [record.step for record in expected_records]
    for record, other in zip(records, expected_records, strict=True):
        assert record.losses == pytest.approx(other.losses, rel=1e-4)
        for domain, splits in other.domains.items():
            for split, metrics in splits.items():
                assert record.domains[domain][split].accuracy == metrics.accuracy
                assert record.domains[domain][split].loss == pytest.approx(metrics.loss, rel=1e-5)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a single process."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    assert main(train(folder, *DIGITS, "--quiet")) == 0
    return folder


def test_two_processes_train_what_one_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(train(tmp_path / "one", *DIGITS)) == 0
    shown = capsys.readouterr()
    finished = run(train(tmp_path / "two", *DIGITS, "--devices", "2"))
    assert (finished.returncode, finished.stderr) == (0, shown.err)
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert finished.stdout.replace("/two/", "/one/").split() == shown.out.split()
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}

    again = run(train(tmp_path / "two", *DIGITS, "--devices", "2", "--json"))
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["trained"] is False

    other = run(train(tmp_path / "two", *DIGITS, "--devices", "2", "--set", "ema=0.5"))
    assert (other.returncode, other.stdout) == (2, "")
    assert len(other.stderr.splitlines()) == 1
    assert "holds a run with another config (hparams.ema: None → 0.5)" in other.stderr


def test_images_are_shared_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_pictures(tmp_path / "animals")
    backbone = ["--backbone", "test_vit", "--backbone-arg", "img_size=32", "--no-pretrained"]
    tiny = ["--data", str(data), "--image-size", "32", *backbone, "--quiet"]
    assert main(train(tmp_path / "one", *tiny)) == 0
    finished = run(train(tmp_path / "two", *tiny, "--devices", "2"))
    assert (finished.returncode, finished.stderr) == (0, capsys.readouterr().err)
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize(("algorithm", "devices"), [("Interrupted", "3"), ("Killed", "1")])
def test_a_run_is_continued_with_another_number_of_processes(
    algorithm: str, devices: str, one: Path, tmp_path: Path
) -> None:
    chosen = [*DIGITS, "--algorithm", f"leaving:{algorithm}"]
    left = run(train(tmp_path / "cut", *chosen, "--devices", "2"), tmp_path / "mark")
    steps = [record.step for record in read_records(tmp_path / "cut" / "metrics.jsonl")]
    assert steps == [4]
    if algorithm == "Interrupted":
        assert left.returncode == 128 + signal.SIGTERM
        assert len(left.stderr.splitlines()) == 1
        assert f"stopped after step {LEAVES_AFTER} of {STEPS}, saved in" in left.stderr
    else:
        assert left.returncode != 0
        assert "Traceback" not in left.stderr
    continued = run(train(tmp_path / "cut", *chosen, "--devices", devices), tmp_path / "mark")
    assert continued.returncode == 0, continued.stderr
    assert_same_run(tmp_path / "cut", one)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--devices", "0"], "devices must be at least 1, got 0"),
        (["--nodes", "0"], "nodes must be at least 1, got 0"),
        (
            ["--devices", "2", "--algorithm", "arm"],
            "arm looks at the inputs of the whole batch and trains on one device",
        ),
    ],
)
def test_what_cannot_be(more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [] if "--algorithm" in more else ["--algorithm", "erm"]
    assert main(["train", "--data", "colored-digits", *COMMON, *chosen, *more, "--output", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert message in captured.err
    assert not (tmp_path / "run").exists()


def test_layers_that_learn_from_their_batch_are_refused() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizers = [Adam(network.parameters())]
    with pytest.raises(ConfigError, match="1 of the featurizer is a batch-norm layer that learns from its batch"):
        Ranks("cpu", "32", devices=2).keep_equal(network, optimizers)
    Ranks("cpu", "32", devices=2).keep_equal(network.eval(), optimizers)
    Ranks("cpu", "32").keep_equal(network.train(), optimizers)


def test_more_devices_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="2 devices of the kind 'cuda' were asked for, there are 1 here"):
        Ranks("cuda", "32", devices=2)
