"""Stopped at any moment and continued, a run ends with the same bits."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fishr.data import MultiDomainDataset, load_dataset
from fishr.errors import RunInterruptedError
from fishr.training import RunConfig, loop, train
from fishr.training.loop import Silent
from small_runs import (
    CHECKPOINT_EVERY,
    PICTURE_RUNS,
    RUNS,
    STEPS,
    SWITCH_ON,
    Outcome,
    outcome,
    picture_config,
    run_config,
    signal_at,
)

HERE = Path(__file__).parent


def stop_at(config: RunConfig, dataset: MultiDomainDataset, folder: Path, step: int, number: int) -> None:
    with pytest.raises(RunInterruptedError) as stopped:
        train(config, dataset, folder, device="cpu", observer=signal_at(step, number))
    assert stopped.value.signal_number == number


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# Killed


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder that the program of killed runs filled, and its report."""
    folder = tmp_path_factory.mktemp("killed")
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(
        [sys.executable, HERE / "killed_runs.py", folder],
        env={
            **os.environ,
            **threads,
            "PYTHONPATH": path,
        },
        check=True,
    )
    return folder, json.loads((folder / "report.json").read_text())


KILLED_IN_A_ROW = [*RUNS, "pictures-fishr", "pictures-swad", "pictures-select-sma"]


@pytest.mark.parametrize("name", KILLED_IN_A_ROW)
def test_killed_several_times_in_a_row(killed: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, report = killed
    assert report[name]["kills"] == 5
    assert outcome(folder / name / "killed") == outcome(folder / name / "undisturbed")


def test_stopped_from_outside_wherever_it_was(killed: tuple[Path, dict[str, Any]]) -> None:
    folder, report = killed
    assert report["outside"]["codes"] == [-9, 128 + 15, -9, 128 + 2]
    assert outcome(folder / "outside" / "killed") == outcome(folder / "outside" / "undisturbed")


@pytest.mark.parametrize("name", ["every-write", "every-write-select"])
def test_killed_before_any_change_of_its_folder(killed: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, report = killed
    kills, refused = report[name]["kills"], report[name]["refused"]
    assert kills > 30
    expected = outcome(folder / name / "undisturbed")
    for write in range(1, kills + 1):
        if str(write) not in refused:
            assert outcome(folder / name / f"killed-{write}") == expected, f"killed at write {write}"


@pytest.mark.parametrize("name", ["every-write", "every-write-select"])
def test_no_kill_makes_a_folder_useless(killed: tuple[Path, dict[str, Any]], name: str) -> None:
    assert killed[1][name]["refused"] == {}


def test_every_name_of_a_killed_run_is_looked_at(killed: tuple[Path, dict[str, Any]]) -> None:
    assert {*KILLED_IN_A_ROW, "every-write", "every-write-select", "outside"} == set(killed[1])


def test_nothing_half_written_stays(killed: tuple[Path, dict[str, Any]]) -> None:
    done = [file.parent for file in killed[0].rglob("DONE")]
    assert len(done) > 30
    assert [path for folder in done for path in folder.rglob(".*")] == []


# Stopped by a signal


@pytest.mark.parametrize("name", RUNS)
def test_stopped_after_every_step(
    name: str, digits: MultiDomainDataset, undisturbed: Callable[[str], Outcome], tmp_path: Path
) -> None:
    for step in range(1, STEPS):
        stop_at(run_config(name), digits, tmp_path / "run", step, (signal.SIGTERM, signal.SIGINT)[step % 2])
    assert train(run_config(name), digits, tmp_path / "run", device="cpu").trained
    assert outcome(tmp_path / "run") == undisturbed(name)


@pytest.mark.parametrize("name", PICTURE_RUNS)
def test_runs_on_images_stopped_now_and_then(
    name: str, pictures: MultiDomainDataset, undisturbed_pictures: Callable[[str], Outcome], tmp_path: Path
) -> None:
    config = picture_config(pictures, name)
    for step in (1, 4, 5, 8, 11):
        stop_at(config, pictures, tmp_path / "run", step, signal.SIGTERM)
    assert train(config, pictures, tmp_path / "run", device="cpu").trained
    assert outcome(tmp_path / "run") == undisturbed_pictures(name)


@pytest.mark.parametrize("step", [1, CHECKPOINT_EVERY, CHECKPOINT_EVERY + 1, SWITCH_ON, SWITCH_ON + 1, STEPS - 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_once(
    step: int, number: int, digits: MultiDomainDataset, undisturbed: Callable[[str], Outcome], tmp_path: Path
) -> None:
    stop_at(run_config("fishr"), digits, tmp_path / "run", step, number)
    assert checkpoints(tmp_path / "run")[-1] == f"step-{step:08d}"
    started_at = []

    class Started(Silent):
        def on_start(self, config: RunConfig, step: int) -> None:
            started_at.append(step)

    train(run_config("fishr"), digits, tmp_path / "run", device="cpu", observer=Started())
    assert started_at == [step]
    assert outcome(tmp_path / "run") == undisturbed("fishr")


def test_the_message_says_where_and_how_to_continue(digits: MultiDomainDataset, tmp_path: Path) -> None:
    with pytest.raises(
        RunInterruptedError,
        match=rf"^stopped after step 5 of {STEPS}, saved in {tmp_path}/run: run the same command again to continue$",
    ):
        train(run_config(), digits, tmp_path / "run", device="cpu", observer=signal_at(5))


def test_a_signal_during_the_last_step_lets_the_run_end(
    digits: MultiDomainDataset, undisturbed: Callable[[str], Outcome], tmp_path: Path
) -> None:
    with pytest.raises(RunInterruptedError, match=rf"^stopped; the run in {tmp_path}/run is done$"):
        train(run_config(), digits, tmp_path / "run", device="cpu", observer=signal_at(STEPS))
    assert not train(run_config(), digits, tmp_path / "run", device="cpu").trained
    assert outcome(tmp_path / "run") == undisturbed("erm")


def test_it_never_stops_without_having_saved(
    digits: MultiDomainDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal may arrive between any two looks of the loop at it."""
    for looks in range(8):

        class Request:
            left = looks

            @property
            def signal_number(self) -> int | None:
                self.left -= 1
                return signal.SIGTERM if self.left < 0 else None

        monkeypatch.setattr("fishr.training.loop.stop_on_signal", lambda: contextlib.nullcontext(Request()))
        folder = tmp_path / str(looks)
        with pytest.raises(RunInterruptedError) as stopped:
            train(run_config(), digits, folder, device="cpu")
        step = int(re.search(r"stopped after step (\d+)", str(stopped.value))[1])
        assert checkpoints(folder)[-1] == f"step-{step:08d}"


# Done


def test_called_again_when_done_it_does_nothing(digits: MultiDomainDataset, tmp_path: Path) -> None:
    first = train(run_config(), digits, tmp_path / "run", device="cpu")
    files = {path: (path.stat().st_mtime_ns, path.is_dir()) for path in (tmp_path / "run").rglob("*")}
    told = []

    class Listening(Silent):
        def on_start(self, config: RunConfig, step: int) -> None:
            told.append(step)

    again = train(run_config(), digits, tmp_path / "run", device="cpu", observer=Listening())
    assert (first.trained, again.trained) == (True, False)
    assert again.records == first.records
    assert [record.step for record in again.records] == [4, 8, 12]
    assert {path: (path.stat().st_mtime_ns, path.is_dir()) for path in (tmp_path / "run").rglob("*")} == files
    assert told == []
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json", "metrics.jsonl", "model", "DONE"}


# What no run on images depends on


@pytest.mark.parametrize("cache", ["disk", "ram", "none"])
def test_where_images_are_kept_does_not_matter(
    cache: str,
    pictures: MultiDomainDataset,
    pictures_folder: Path,
    undisturbed_pictures: Callable[[str], Outcome],
    tmp_path: Path,
) -> None:
    """Nor where their folder lies."""
    moved = shutil.copytree(pictures_folder, tmp_path / "elsewhere/pictures")
    dataset = load_dataset(str(moved), image_size=16, cache=cache, cache_folder=tmp_path / "cache")
    config = picture_config(dataset, "select-sma")
    assert config == picture_config(pictures, "select-sma")
    train(config, dataset, tmp_path / "run", device="cpu")
    assert outcome(tmp_path / "run") == undisturbed_pictures("select-sma")


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_does_not_matter(
    threads: int,
    pictures: MultiDomainDataset,
    undisturbed_pictures: Callable[[str], Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = undisturbed_pictures("plain")
    with ThreadPoolExecutor(threads) as pool:
        monkeypatch.setattr("fishr.data.images._threads", lambda: pool)
        train(picture_config(pictures), pictures, tmp_path / "run", device="cpu")
    assert outcome(tmp_path / "run") == expected


# That these tests could see a difference


def test_another_run_on_images_has_other_bits(undisturbed_pictures: Callable[[str], Outcome]) -> None:
    assert len({undisturbed_pictures(name)[0] for name in PICTURE_RUNS}) == len(PICTURE_RUNS)


@pytest.mark.parametrize("change", [{"seed": 4}, {"hparams": {"switch_on": SWITCH_ON + 1}}, {"hparams": {"ema": 0.8}}])
def test_another_run_has_other_bits(
    change: dict[str, Any], digits: MultiDomainDataset, undisturbed: Callable[[str], Outcome], tmp_path: Path
) -> None:
    train(run_config("fishr", **change), digits, tmp_path / "run", device="cpu")
    assert outcome(tmp_path / "run")[0] != undisturbed("fishr")[0]


def test_random_numbers_matter(digits: MultiDomainDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a seed for each step a continued run would end with other bits."""
    seed = loop._seed_torch
    monkeypatch.setattr(loop, "_seed_torch", lambda *words: seed(*words) if len(words) == 1 else None)
    train(run_config(), digits, tmp_path / "undisturbed", device="cpu")
    stop_at(run_config(), digits, tmp_path / "run", 5, signal.SIGTERM)
    train(run_config(), digits, tmp_path / "run", device="cpu")
    assert outcome(tmp_path / "run")[0] != outcome(tmp_path / "undisturbed")[0]
