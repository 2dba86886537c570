import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from fishr.errors import RunError
from fishr.records import RunRecord
from fishr.sweeps.folder import Job, SweepFolder

SETTINGS = {"steps": 600, "set": ["lr=0.1"]}
JOBS = [Job(f"run{draw}", "pacs", "erm", ("sketch",), draw, 0, "pacs", None) for draw in range(4)]


def state(sweep: SweepFolder) -> list[Any]:
    return [progress.state for progress in sweep.progress()]


def begin(sweep: SweepFolder, job: Job, steps_done: tuple[int, ...] = ()) -> Path:
    run = sweep.runs / job.run
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"steps": 600}))
    with (run / "metrics.jsonl").open("w") as file:
        for step in steps_done:
            file.write(RunRecord(step, {}, {}, 1.5).to_json() + "\n")
    return run


def test_jobs_are_added_to_the_plan(tmp_path: Path) -> None:
    sweep = SweepFolder(tmp_path / "sweep")
    sweep.plan(SETTINGS, JOBS[:2])
    sweep.plan(SETTINGS, JOBS[1:])
    assert SweepFolder(tmp_path / "sweep").jobs() == JOBS
    assert sweep.settings() == SETTINGS


def test_other_settings_are_refused_with_each_difference(tmp_path: Path) -> None:
    sweep = SweepFolder(tmp_path)
    sweep.plan(SETTINGS, JOBS)
    with pytest.raises(RunError, match=r"holds a sweep with other settings \(steps: 600 → 5001\): choose another"):
        sweep.plan({**SETTINGS, "steps": 5001}, JOBS)
    assert sweep.settings() == SETTINGS


def test_somebody_elses_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunError, match=r"exists and is not a sweep \(it has no sweep\.json\)"):
        SweepFolder(tmp_path).plan(SETTINGS, JOBS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"there is no sweep in .* \(it has no sweep\.json\)"),
        ("", r"sweep\.json cannot be read \(JSONDecodeError"),
        ('{"format": 0}', r"sweep\.json was written by another version of fishr"),
        ("{}", r"sweep\.json cannot be read \(KeyError"),
    ],
)
def test_what_is_no_sweep(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(RunError, match=message):
        SweepFolder(tmp_path).settings()


def test_what_a_process_was_writing_when_it_was_killed_is_nobody_elses(tmp_path: Path) -> None:
    (tmp_path / ".sweep.json.1234").touch()
    SweepFolder(tmp_path).plan(SETTINGS, JOBS)


def test_damaged_files_of_a_run_are_named(tmp_path: Path) -> None:
    sweep = SweepFolder(tmp_path)
    sweep.plan(SETTINGS, JOBS[:2])
    (begin(sweep, JOBS[0]) / "config.json").write_text("{")
    (begin(sweep, JOBS[1]) / "FAILED").touch()
    damaged, failed = sweep.progress()
    assert damaged.reason.startswith("its files cannot be read (JSONDecodeError")
    assert failed.reason == "for a reason that could not be written"


def test_progress(tmp_path: Path) -> None:
    sweep = SweepFolder(tmp_path)
    sweep.plan(SETTINGS, JOBS)
    assert state(sweep) == ["waiting"] * 4
    (begin(sweep, JOBS[0]) / "DONE").touch()
    (begin(sweep, JOBS[1]) / "FAILED").write_text("Traceback\n  a line\nloss is nan\n")
    (begin(sweep, JOBS[2], (200, 400)) / ".lease").touch()
    left = begin(sweep, JOBS[3], (200,)) / ".lease"
    left.touch()
    an_hour_ago = time.time() - 3600
    os.utime(left, (an_hour_ago, an_hour_ago))
    assert state(sweep) == ["done", "failed", "running", "waiting"]
    _, failed, running, waiting = sweep.progress()
    assert failed.reason == "loss is nan"
    assert (running.step, running.steps, running.seconds_left) == (400, 600, 300.0)
    assert (waiting.step, waiting.steps) == (200, 600)


def test_a_run_without_a_record_has_no_pace(tmp_path: Path) -> None:
    sweep = SweepFolder(tmp_path)
    sweep.plan(SETTINGS, JOBS[:1])
    (begin(sweep, JOBS[0]) / ".lease").touch()
    (progress,) = sweep.progress()
    assert (progress.state, progress.step, progress.seconds_left) == ("running", 0, None)


def test_failures_are_forgotten_for_another_try(tmp_path: Path) -> None:
    sweep = SweepFolder(tmp_path)
    sweep.plan(SETTINGS, JOBS)
    (begin(sweep, JOBS[1]) / "FAILED").write_text("loss is nan\n")
    assert sweep.retry() == [JOBS[1]]
    assert state(sweep) == ["waiting"] * 4
    assert sweep.retry() == []


def test_a_stop_is_seen_by_others(tmp_path: Path) -> None:
    sweep = SweepFolder(tmp_path)
    sweep.plan(SETTINGS, JOBS)
    before = SweepFolder(tmp_path).asked_to_stop()
    sweep.ask_to_stop()
    assert SweepFolder(tmp_path).asked_to_stop() > before
