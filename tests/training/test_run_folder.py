import errno
import json
import os
import re
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fishr.data import MultiDomainDataset
from fishr.errors import ConfigError, RunBusyError, RunError, RunInterruptedError
from fishr.models import ModelConfig
from fishr.records import read_records
from fishr.training import run_folder, train
from fishr.training.run_folder import RunFolder
from small_runs import AtStep, Outcome, outcome, run_config, signal_at


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Somebody else's folder


@pytest.mark.parametrize("done", [False, True])
def test_another_config_is_refused_with_each_difference(done: bool, digits: MultiDomainDataset, tmp_path: Path) -> None:
    if done:
        train(run_config("fishr"), digits, tmp_path / "run", device="cpu")
    else:
        RunFolder(tmp_path / "run", run_config("fishr")).create()
    before = snapshot(tmp_path / "run")
    other = run_config("fishr", steps=20, hparams={"ema": 0.5})
    with pytest.raises(RunError) as caught:
        train(other, digits, tmp_path / "run", device="cpu")
    assert str(caught.value) == (
        f"{tmp_path}/run holds a run with another config "
        "(hparams.ema: 0.9 → 0.5; steps: 12 → 20): "
        "choose another --output, or delete the folder"
    )
    assert snapshot(tmp_path / "run") == before


def test_a_folder_with_other_things_is_refused(digits: MultiDomainDataset, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(
        RunError, match=rf"^{tmp_path} exists and is not a run \(it has no config.json\): choose another --output$"
    ):
        train(run_config(), digits, tmp_path, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_refused(digits: MultiDomainDataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(RunError, match=rf"^{tmp_path}/file exists and is not a run"):
        train(run_config(), digits, tmp_path / "file", device="cpu")
    with pytest.raises(RunError, match=rf"^cannot write the run in {tmp_path}/file/run: Not a directory"):
        train(run_config(), digits, tmp_path / "file/run", device="cpu")
    assert (tmp_path / "file").read_text() == "precious"


def test_an_empty_folder_is_taken(
    digits: MultiDomainDataset, undisturbed: Callable[[str], Outcome], tmp_path: Path
) -> None:
    (tmp_path / "deep/run").mkdir(parents=True)
    train(run_config(), digits, tmp_path / "deep/run", device="cpu")
    train(run_config(), digits, tmp_path / "not/there/yet", device="cpu")
    assert outcome(tmp_path / "deep/run") == outcome(tmp_path / "not/there/yet") == undisturbed("erm")


# A damaged config.json


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", r"JSONDecodeError: .*"),
        ('{"format": 2, "data":', r"JSONDecodeError: .*"),
        ("[]", r"TypeError: .*"),
        ("null", r"AttributeError: .*"),
        ("{}", r"KeyError: 'format'"),
        ('{"format": 2}', r"KeyError: .*"),
    ],
)
def test_a_config_that_cannot_be_read(content: str, reason: str, digits: MultiDomainDataset, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(
        RunError,
        match=rf"^{tmp_path}/config.json cannot be read \({reason}\): choose another --output, or delete the folder$",
    ):
        train(run_config(), digits, tmp_path, device="cpu")
    assert (tmp_path / "config.json").read_text() == content


def test_a_config_that_is_not_text(digits: MultiDomainDataset, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(RunError, match=rf"^{tmp_path}/config.json cannot be read \(UnicodeDecodeError"):
        train(run_config(), digits, tmp_path, device="cpu")


def altered(folder: Path, change: dict[str, Any]) -> None:
    RunFolder(folder, run_config()).create()
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, r"config.json was written by another version of fishr: choose another --output$"),
        ({"format": None}, r"config.json was written by another version of fishr"),
        ({"algorithm": "fisher"}, r"holds a run with another config \(algorithm: fisher → erm\): choose another"),
        ({"algorithm": "this:zen"}, r"holds a run with another config \(algorithm: this:zen → erm\): choose another"),
        ({"hparams": {"speed": 3}}, r"config.json cannot be read \(TypeError: .*'speed'"),
        ({"hparams": {"lr": -1}}, r"config.json names something .*: lr must be above 0, got -1$"),
        ({"unheard_of": 1}, r"config.json cannot be read \(TypeError: .*'unheard_of'"),
        (
            {"average": {"name": "swa", "options": {}}},
            r"config.json names something .*: unknown average 'swa'; did you",
        ),
        ({"average": {"name": "ema", "options": {"decay": 2}}}, r"config.json names something .*: decay must lie in"),
        ({"average": 3}, r"config.json cannot be read \(TypeError: "),
    ],
)
def test_a_config_that_means_nothing_here(
    change: dict[str, Any], message: str, digits: MultiDomainDataset, tmp_path: Path
) -> None:
    altered(tmp_path / "run", change)
    with pytest.raises(RunError, match=message):
        train(run_config(), digits, tmp_path / "run", device="cpu")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"step": 12}', '{"step": 12, "domains": {"a": {"in": 3}}}']
)
def test_a_damaged_mark_of_the_end_is_a_run_error(content: str, digits: MultiDomainDataset, tmp_path: Path) -> None:
    train(run_config(), digits, tmp_path / "run", device="cpu")
    (tmp_path / "run/DONE").write_text(content)
    with pytest.raises(RunError, match=rf"^{tmp_path}/run/DONE cannot be read: delete the run's folder to start anew$"):
        train(run_config(), digits, tmp_path / "run", device="cpu")


def test_damaged_records_are_a_run_error(digits: MultiDomainDataset, tmp_path: Path) -> None:
    train(run_config(), digits, tmp_path / "run", device="cpu")
    file = tmp_path / "run/metrics.jsonl"
    file.write_text(file.read_text().replace("losses", 'los"ses', 1))
    with pytest.raises(RunError, match=r"metrics.jsonl .*line 1"):
        train(run_config(), digits, tmp_path / "run", device="cpu")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hparams": {"ema": 1.5}}, r"in \[0, 1\), got 1.5"),
        ({"model": ModelConfig("nope")}, "unknown featurizer 'nope'"),
        ({"test_domains": ("+80%", "+90%")}, "Fishr compares domains and needs at least 2 to train on, got 1"),
        ({"hparams": {"variant": "covariance"}}, "takes no moving average"),
    ],
)
def test_a_config_that_cannot_be_leaves_no_folder(
    wrong: dict[str, Any], message: str, digits: MultiDomainDataset, tmp_path: Path
) -> None:
    """Otherwise the corrected call would be refused: the folder would hold a run with another config."""
    with pytest.raises(ConfigError, match=message):
        train(run_config("fishr", **wrong), digits, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


# No space left


class FullDisk:
    """A disk on which the n-th write fails: opening a file to write, or forcing one to disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.writes, self.fails_at = 0, 0
        self.opens, self.fsync = Path.open, os.fsync
        disk = self

        def open_(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if set(mode) & set("wax+"):
                disk.write()
            return disk.opens(path, mode, *arguments, **options)

        def fsync(descriptor: int) -> None:
            disk.write()
            disk.fsync(descriptor)

        monkeypatch.setattr(Path, "open", open_)
        monkeypatch.setattr(os, "fsync", fsync)

    def write(self) -> None:
        self.writes += 1
        if self.writes == self.fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def message_when_full_at(self, write: int, job: Callable[[], object]) -> str | None:
        """What the RunError says that the job ends with; None if the job makes fewer writes."""
        self.writes, self.fails_at = 0, write
        try:
            job()
        except RunError as error:
            return str(error)
        finally:
            self.fails_at = 0
        return None


SENTENCE = (
    "cannot write the run in {}: No space left on device; "
    "what was saved before is intact: mend the cause and run again to continue"
)


@pytest.mark.parametrize("select", [False, True])
def test_no_space_at_any_write(
    select: bool,
    digits: MultiDomainDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    warnings_logged: Callable[[], list[str]],
) -> None:
    # In this trial the second checkpoint is better than the first and as good as the third.
    config = run_config(select=select, trial=1, checkpoint_every=3, steps=9)
    train(config, digits, tmp_path / "undisturbed", device="cpu")
    expected = outcome(tmp_path / "undisturbed")
    disk = FullDisk(monkeypatch)
    made = 2
    for write in range(made + 1, 1000):
        folder = tmp_path / str(write)
        said = disk.message_when_full_at(write, lambda: train(config, digits, folder, device="cpu"))  # noqa: B023
        if said is None:
            break
        assert said == SENTENCE.format(folder), f"write {write}"
        assert list(folder.rglob(".*")) == []
        train(config, digits, folder, device="cpu")
        assert outcome(folder) == expected, f"write {write}"
        assert list(folder.rglob(".*")) == []
    assert write > 20
    # No checkpoint was found to be damaged: the one before was intact each time.
    assert warnings_logged() == []


@pytest.mark.parametrize("write", [1, 2])
def test_no_space_for_the_config(
    write: int,
    digits: MultiDomainDataset,
    undisturbed: Callable[[str], Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = FullDisk(monkeypatch)
    folder = tmp_path / "run"
    said = disk.message_when_full_at(write, lambda: train(run_config(), digits, folder, device="cpu"))
    assert said == SENTENCE.format(folder)
    train(run_config(), digits, tmp_path / "run", device="cpu")
    assert outcome(tmp_path / "run") == undisturbed("erm")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A real limit of this process, which meets safetensors too: it writes without Python."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_space_for_the_tensors(
    digits: MultiDomainDataset, undisturbed: Callable[[str], Outcome], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(RunInterruptedError):
        train(run_config(), digits, folder, device="cpu", observer=signal_at(5))
    saved = snapshot(folder / "checkpoints")
    with files_of_at_most(6000), pytest.raises(RunError, match=rf"cannot write the run in {folder}: .*File too large"):
        train(run_config(), digits, folder, device="cpu")
    assert snapshot(folder / "checkpoints") == saved
    train(run_config(), digits, folder, device="cpu")
    assert outcome(folder) == undisturbed("erm")


def test_a_folder_that_may_not_be_written(digits: MultiDomainDataset, tmp_path: Path) -> None:
    """Root may write anywhere, so the refusal is the file system's own: a name that is too long."""
    with pytest.raises(RunError, match=r"^cannot write the run in .*: File name too long; what was saved before"):
        train(run_config(), digits, tmp_path / ("x" * 300), device="cpu")


def test_an_error_of_the_observers_own_is_not_the_disks(digits: MultiDomainDataset, tmp_path: Path) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(run_config(), digits, tmp_path / "run", device="cpu", observer=AtStep(5, fail))


def test_checkpoints_left_by_a_kill_after_the_end_are_removed(digits: MultiDomainDataset, tmp_path: Path) -> None:
    train(run_config(), digits, tmp_path / "run", device="cpu")
    (tmp_path / "run/checkpoints/step-00000012").mkdir(parents=True)
    assert not train(run_config(), digits, tmp_path / "run", device="cpu").trained
    assert not (tmp_path / "run/checkpoints").exists()


def test_two_processes_do_not_work_on_one_run(digits: MultiDomainDataset, tmp_path: Path) -> None:
    """The other one finds it taken while it runs, and nothing is lost by that."""
    refused: list[str] = []

    def other() -> None:
        with pytest.raises(RunError, match=r"another process is working on the run in .*: wait for it") as error:
            train(run_config(), digits, tmp_path / "run", device="cpu")
        refused.append(str(error.value))

    train(run_config(), digits, tmp_path / "run", device="cpu", observer=AtStep(5, other))
    assert len(refused) == 1
    train(run_config(), digits, tmp_path / "alone", device="cpu")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "alone")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json", "metrics.jsonl", "model", "DONE"}


@contextmanager
def leased_elsewhere(folder: RunFolder) -> Iterator[Path]:
    """A lease that a process on another machine has written; it says no more from then on."""
    with folder.alone():
        (lease,) = folder.path.glob(".lease*")
        here = lease.read_text()
    elsewhere = here.replace(socket.gethostname(), "elsewhere")
    assert elsewhere != here
    lease.write_text(elsewhere)
    yield lease


def long_ago(path: Path) -> None:
    an_hour_ago = time.time() - 3600
    os.utime(path, (an_hour_ago, an_hour_ago))


def test_a_run_whose_process_on_another_machine_went_silent_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(run_folder, "TAKEOVER_SECONDS", 0.3)
    folder = RunFolder(tmp_path / "run", run_config())
    with leased_elsewhere(folder) as lease:
        with pytest.raises(RunBusyError), folder.alone():  # it may be alive
            pass
        long_ago(lease)
        with folder.alone():
            pass


def test_a_lease_that_nobody_came_to_write_is_no_lease(tmp_path: Path) -> None:
    """A power failure leaves an empty file."""
    folder = RunFolder(tmp_path / "run", run_config())
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lease").touch()
    long_ago(tmp_path / "run/.lease")
    with folder.alone():
        pass


def test_a_run_whose_process_on_another_machine_is_alive_is_not(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", run_config())
    with (
        leased_elsewhere(folder) as lease,
        pytest.raises(RunBusyError, match=rf"another process is working on .*delete {re.escape(str(lease))}\)"),
        folder.alone(),
    ):
        pass


@pytest.mark.parametrize("other_process", ["at work", "done"])
def test_a_process_that_was_silent_for_too_long_writes_nothing(
    other_process: str, digits: MultiDomainDataset, tmp_path: Path
) -> None:
    """Its lease is another's, as it is after a machine has slept, or that one has finished and removed it."""
    lease = tmp_path / "run/.lease"

    def lose() -> None:
        theirs = re.sub("token=.*", f"token={'0' * 32}", lease.read_text())
        lease.unlink()
        if other_process == "at work":
            lease.write_text(theirs)

    with pytest.raises(RunBusyError, match="another process has taken over the run"):
        train(run_config(), digits, tmp_path / "run", device="cpu", observer=AtStep(5, lose))
    assert [record.step for record in read_records(tmp_path / "run/metrics.jsonl")] == [4]


def test_a_run_that_another_process_finished_meanwhile_is_left_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", run_config())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "DONE").write_text("")
    with pytest.raises(RunError, match="another process has just finished the run"), folder.alone():
        pass
