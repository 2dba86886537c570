"""Models of checkpoints, kept for analyses."""

import pytest

from fishr.errors import RunError, RunInterruptedError
from fishr.models import load_model
from fishr.training import AverageConfig, train
from fishr.training.run_folder import snapshots_of
from small_runs import CHECKPOINT_EVERY, STEPS, outcome, run_config, signal_at, small_digits

EXPECTED = list(range(CHECKPOINT_EVERY, STEPS + 1, CHECKPOINT_EVERY))


def weights(folder):
    return {step: (path / "model.safetensors").read_bytes() for step, path in snapshots_of(folder).items()}


def test_a_model_of_each_checkpoint(tmp_path):
    config = run_config("fishr", out_fraction=0.0)
    train(config, small_digits(), tmp_path / "run", snapshots=True)
    assert list(snapshots_of(tmp_path / "run")) == EXPECTED
    assert weights(tmp_path / "run")[STEPS] == (tmp_path / "run/model/model.safetensors").read_bytes()
    assert len(set(weights(tmp_path / "run").values())) == len(EXPECTED)
    assert load_model(snapshots_of(tmp_path / "run")[CHECKPOINT_EVERY]).card.provenance["step"] == CHECKPOINT_EVERY


def test_they_change_nothing_else(tmp_path):
    for name, snapshots in (("with", True), ("without", False)):
        train(run_config(), small_digits(), tmp_path / name, snapshots=snapshots)
    assert outcome(tmp_path / "with") == outcome(tmp_path / "without")
    assert snapshots_of(tmp_path / "without") == {}
    assert not (tmp_path / "without/snapshots").exists()


def test_a_run_that_was_cut_has_those_of_an_undisturbed_one(tmp_path):
    train(run_config(), small_digits(), tmp_path / "undisturbed", snapshots=True)
    with pytest.raises(RunInterruptedError):
        train(run_config(), small_digits(), tmp_path / "cut", snapshots=True, observer=signal_at(CHECKPOINT_EVERY + 1))
    assert list(snapshots_of(tmp_path / "cut")) == EXPECTED[:1]
    train(run_config(), small_digits(), tmp_path / "cut", snapshots=True)
    assert weights(tmp_path / "cut") == weights(tmp_path / "undisturbed")


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    leftover = tmp_path / "run/snapshots/.step-000004.host.1.x"
    with pytest.raises(RunInterruptedError):
        train(run_config(), small_digits(), tmp_path / "run", snapshots=True, observer=signal_at(1))
    leftover.mkdir(parents=True)
    train(run_config(), small_digits(), tmp_path / "run", snapshots=True)
    assert not leftover.exists()
    assert list(snapshots_of(tmp_path / "run")) == EXPECTED


def test_averaged_weights_are_what_the_record_is_about(tmp_path):
    config = run_config(average=AverageConfig("sma", {"start": 1}), out_fraction=0.0)
    train(config, small_digits(), tmp_path / "run", snapshots=True)
    assert weights(tmp_path / "run")[STEPS] == (tmp_path / "run/model/model.safetensors").read_bytes()


def test_a_done_run_without_them(tmp_path):
    train(run_config(), small_digits(), tmp_path / "run")
    with pytest.raises(
        RunError,
        match=r"run is done and kept no snapshots: choose another --output to train it anew$",
    ):
        train(run_config(), small_digits(), tmp_path / "run", snapshots=True)
    train(run_config(), small_digits(), tmp_path / "other", snapshots=True)
    assert not train(run_config(), small_digits(), tmp_path / "other", snapshots=True).trained
