"""The folder of a sweep: what it is made of, its runs, and how far each of them is. Needs no torch."""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import SoftFileLease

from fishr.errors import RunError
from fishr.files import write_text
from fishr.records import (
    CONFIG_FILE,
    DONE_FILE,
    FAILED_FILE,
    LEASE_FILE,
    LEASE_SECONDS,
    RECORDS_FILE,
    RunRecord,
    complete_lines,
    settings_that_differ,
)

SETTINGS, JOBS, RUNS, LOGS, STOP, LOCK = "sweep.json", "jobs.jsonl", "runs", "logs", "STOP", ".lock"
FORMAT = 1

State = Literal["done", "running", "failed", "waiting"]


@dataclass(frozen=True)
class Job:
    """A run that is planned.

    Attributes:
        run: Name of its folder, the hash of its config.
        data: Name of the dataset.
        algorithm: Name of the algorithm.
        test_domains: Domains held out.
        draw: Number of its hyperparameter draw.
        trial: Seed of its splits.
        source: What the dataset is loaded by: its name, or a path.
        root: Folder of the datasets that have a name.
    """

    run: str
    data: str
    algorithm: str
    test_domains: tuple[str, ...]
    draw: int
    trial: int
    source: str
    root: str | None

    @property
    def title(self) -> str:
        """For readers."""
        held_out = ", ".join(self.test_domains)
        return f"{self.algorithm} on {self.data}, held out {held_out}, draw {self.draw}, trial {self.trial}"


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        job: The run.
        state: What is known of it.
        step: Updates that its last checkpoint has.
        steps: Updates that it is to make; None if it has not begun.
        seconds_left: By the pace of its last steps; None if nothing is known.
        reason: Of a failure, or of files that are damaged, a line.
    """

    job: Job
    state: State
    step: int = 0
    steps: int | None = None
    seconds_left: float | None = None
    reason: str = ""


class SweepFolder:
    """``sweep.json``, ``jobs.jsonl``, ``runs/HASH``, ``logs/``.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs, self.logs = path / RUNS, path / LOGS
        self._settings, self._jobs, self._stop = path / SETTINGS, path / JOBS, path / STOP

    def check(self, settings: Mapping[str, Any]) -> None:
        """Check that the folder is one for a sweep with these settings.

        Raises:
            RunError: it holds a sweep with other settings, or something else.
        """
        if self._settings.exists():
            changed = settings_that_differ(self.settings(), json.loads(json.dumps(settings)))
            if changed:
                raise RunError(
                    f"{self.path} holds a sweep with other settings ({'; '.join(changed)}): choose another --output"
                )
        elif self.path.exists() and any(not item.name.startswith(".") for item in self.path.iterdir()):
            raise RunError(f"{self.path} exists and is not a sweep (it has no {SETTINGS}): choose another --output")

    def plan(self, settings: Mapping[str, Any], jobs: Iterable[Job]) -> None:
        """Add runs to those that are planned already.

        Args:
            settings: What all runs share, plain values.
            jobs: The runs.

        Raises:
            RunError: the folder holds a sweep with other settings, or something else.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with SoftFileLease(self.path / LOCK, lease_duration=LEASE_SECONDS):
            self.check(settings)
            planned = {job.run: job for job in (*self.jobs(), *jobs)}
            write_text(self._settings, json.dumps({"format": FORMAT, "settings": settings}, indent=2) + "\n")
            write_text(self._jobs, "".join(json.dumps(asdict(job)) + "\n" for job in planned.values()))

    def settings(self) -> dict[str, Any]:
        """What all runs share.

        Raises:
            RunError: there is no sweep, or it cannot be read.
        """
        try:
            content = json.loads(self._settings.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise RunError(f"{self._settings} was written by another version of fishr: choose another --output")
            settings: dict[str, Any] = content["settings"]
        except FileNotFoundError:
            raise RunError(f"there is no sweep in {self.path} (it has no {SETTINGS})") from None
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self._settings} cannot be read ({type(error).__name__}: {error})") from None
        return settings

    def jobs(self) -> list[Job]:
        """The runs that are planned."""
        if not self._jobs.exists():
            return []
        lines = map(json.loads, complete_lines(self._jobs))
        return [Job(**{**line, "test_domains": tuple(line["test_domains"])}) for line in lines]

    def progress(self) -> list[Progress]:
        """How far each run is."""
        return [_progress(job, self.runs / job.run) for job in self.jobs()]

    def retry(self) -> list[Job]:
        """Forget failures, so that the runs are made again; returns these runs."""
        failed = [job for job in self.jobs() if (self.runs / job.run / FAILED_FILE).exists()]
        for job in failed:
            (self.runs / job.run / FAILED_FILE).unlink(missing_ok=True)
        return failed

    def ask_to_stop(self) -> None:
        """Ask all who work on the sweep, on this machine or others, to save their runs and leave."""
        self._stop.touch()

    def asked_to_stop(self) -> float:
        """When that was last asked, by the file system's clock; 0 for never."""
        return self._stop.stat().st_mtime if self._stop.exists() else 0.0


def _progress(job: Job, folder: Path) -> Progress:
    if (folder / DONE_FILE).exists():
        return Progress(job, "done")
    if (reason := failure(folder)) is not None:
        return Progress(job, "failed", reason=reason)
    if not (folder / CONFIG_FILE).exists():
        return Progress(job, "waiting")
    state: State = "running" if _is_held(folder) else "waiting"
    try:
        steps = json.loads((folder / CONFIG_FILE).read_bytes())["steps"]
        records = complete_lines(folder / RECORDS_FILE) if (folder / RECORDS_FILE).exists() else []
        if not records:
            return Progress(job, state, 0, steps)
        last = RunRecord.from_json(records[-1].decode())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return Progress(job, state, reason=f"its files cannot be read ({type(error).__name__}: {error})")
    return Progress(job, state, last.step, steps, (steps - last.step) * last.seconds_per_step)


def failure(run: Path) -> str | None:
    """Why a run has failed, a line; None where it has not."""
    try:
        lines = (run / FAILED_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return None
    return lines[-1] if lines else "for a reason that could not be written"


def _is_held(folder: Path) -> bool:
    """Whether a process says that it works on a run."""
    try:
        return time.time() - (folder / LEASE_FILE).stat().st_mtime < LEASE_SECONDS
    except FileNotFoundError:
        return False
