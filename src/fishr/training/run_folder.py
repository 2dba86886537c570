"""The folder of a run: config, records, checkpoints, model, and whether it is done."""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import SoftFileLease, Timeout

from fishr.errors import FishrError, RunBusyError, RunError
from fishr.files import new_folder, remove_leftovers, write_text
from fishr.models.saved import SavedModel, save_model
from fishr.records import (
    CONFIG_FILE,
    DONE_FILE,
    FAILED_FILE,
    FORMAT,
    LEASE_FILE,
    LEASE_SECONDS,
    RECORDS_FILE,
    RunRecord,
    read_records,
)
from fishr.training.config import RunConfig

CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"
TRACKING_FILE = "tracking.json"

TAKEOVER_SECONDS = 1.0
"""Enough to find out that a process on this machine has died; that one elsewhere has takes as long as a lease."""


class RunFolder:
    """``config.json``, ``metrics.jsonl``, ``checkpoints/``, ``snapshots/``, ``model/``, ``DONE``.

    ``DONE`` holds the record of the model kept, ``snapshots/step-000100`` the model at that checkpoint, where they are
    asked for. What :mod:`fishr.training.tracking` writes lies there too.

    Args:
        path: The folder; :meth:`create` makes it when it is not there.
        config: The run. A folder that holds another run is refused.

    Raises:
        RunError: the folder holds a run with another config, or something that is not a run.
    """

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path, self.config = path, config
        self.checkpoints, self.model = path / CHECKPOINTS, path / "model"
        self.metrics = path / RECORDS_FILE
        self.config_file = path / CONFIG_FILE
        self.tracking_file = path / TRACKING_FILE
        self._held: SoftFileLease | None = None
        if self.config_file.exists():
            differences = _differences(self.config_file, config)
            if differences:
                raise RunError(
                    f"{path} holds a run with another config ({'; '.join(differences)}): "
                    "choose another --output, or delete the folder"
                )
        elif path.exists() and (not path.is_dir() or any(not _is_leftover(item) for item in path.iterdir())):
            raise RunError(f"{path} exists and is not a run (it has no {CONFIG_FILE}): choose another --output")

    def create(self) -> None:
        """Make the folder and write the config, where that has not been done; remove what a killed process left."""
        remove_leftovers(self.path, CONFIG_FILE, RECORDS_FILE, "model", DONE_FILE, FAILED_FILE, TRACKING_FILE)
        for folder in (self.checkpoints, self.path / SNAPSHOTS):
            remove_leftovers(folder, "step-*")
        if not self.config_file.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            content = {"format": FORMAT, **self.config.as_dict()}
            write_text(self.config_file, json.dumps(content, indent=2) + "\n")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes, on other machines too, from working on the run inside the block.

        Raises:
            RunBusyError: another process works on it, or has just finished it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        silent = _age(self._lease) > LEASE_SECONDS
        if silent and self._lease.stat().st_size == 0:  # of a process that died in the middle of writing it
            self._lease.unlink(missing_ok=True)
        patience = LEASE_SECONDS + TAKEOVER_SECONDS if silent else TAKEOVER_SECONDS
        lease = SoftFileLease(self._lease, lease_duration=LEASE_SECONDS, timeout=patience)
        try:
            lease.acquire()
        except Timeout:
            raise RunBusyError(
                f"another process is working on the run in {self.path}: wait for it, or choose another --output "
                f"(if there is none, delete {self._lease})"
            ) from None
        self._held = lease
        try:
            if self.done:
                raise RunBusyError(f"another process has just finished the run in {self.path}: call again to see it")
            yield
        finally:
            self._held = None
            lease.release()

    def check_still_alone(self) -> None:
        """Before something is written.

        Raises:
            RunBusyError: this process said nothing for so long that another one has taken over.
        """
        if self._held is None:
            return
        owner = self._held.owner
        if owner is None or owner.token != self._held.token:
            raise RunBusyError(
                f"another process has taken over the run in {self.path}, as this one was silent for "
                f"{LEASE_SECONDS:.0f} s: it stops"
            )

    @property
    def _lease(self) -> Path:
        return self.path / LEASE_FILE

    @property
    def done(self) -> bool:
        return self._done.exists()

    @property
    def _done(self) -> Path:
        return self.path / DONE_FILE

    def kept(self) -> RunRecord:
        """The record of the model that was kept."""
        try:
            return RunRecord.from_json(self._done.read_text(encoding="utf-8"))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RunError(f"{self._done} cannot be read: delete the run's folder to start anew") from None

    def records(self) -> list[RunRecord]:
        try:
            return read_records(self.metrics)
        except ValueError as error:
            raise RunError(f"{error}: delete the run's folder to start anew") from None

    def forget_records_after(self, step: int) -> None:
        """Drop records that a continued run will write again."""
        kept = [record for record in self.records() if record.step <= step]
        write_text(self.metrics, "".join(record.to_json() + "\n" for record in kept))

    def append(self, record: RunRecord) -> None:
        self.check_still_alone()
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(record.to_json() + "\n")
            file.flush()
            os.fsync(file.fileno())

    def add_snapshot(self, model: SavedModel, step: int) -> None:
        """Write the model of a checkpoint, to stay when the run is done."""
        self.check_still_alone()
        with new_folder(self.path / SNAPSHOTS / f"step-{step:06d}") as aside:
            save_model(aside, model)

    def finish(self, model: SavedModel | None, record: RunRecord) -> None:
        """Write the model, where it is to be kept, and mark the run as done; its checkpoints are of no more use."""
        self.check_still_alone()
        if model is not None:
            with new_folder(self.model) as aside:
                save_model(aside, model)
        write_text(self._done, record.to_json() + "\n")
        tidy(self.path)


def snapshots_of(run: Path) -> dict[int, Path]:
    """Step and folder of the models that a run kept at its checkpoints, oldest first."""
    names = (re.fullmatch(r"step-(\d+)", folder.name) for folder in (run / SNAPSHOTS).glob("step-*"))
    return {step: run / SNAPSHOTS / f"step-{step:06d}" for step in sorted(int(name[1]) for name in names if name)}


def tidy(run: Path) -> None:
    """Remove what the folder of a run that is done needs no more, or what a killed process left in it."""
    shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)
    (run / LEASE_FILE).unlink(missing_ok=True)


def _age(path: Path) -> float:
    """Seconds since a file was touched; 0 where there is none."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _is_leftover(path: Path) -> bool:
    """What may be in the folder of a run that has not come to its config."""
    return path.name.startswith((f".{CONFIG_FILE}.", LEASE_FILE, FAILED_FILE, f".{FAILED_FILE}."))


def _differences(path: Path, config: RunConfig) -> list[str]:
    """Settings in which the config in a file is another one.

    The algorithms' names are compared first, as texts: a name may be that of a module, which a file is not to import.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise RunError(f"{path} was written by another version of fishr: choose another --output")
        if content["algorithm"] != config.algorithm:
            return [f"algorithm: {content['algorithm']} → {config.algorithm}"]
        return RunConfig.from_dict(content).differences(config)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path} cannot be read ({type(error).__name__}: {error}): choose another --output, or delete the folder"
        ) from None
    except RunError:
        raise
    except FishrError as error:
        raise RunError(f"{path} names something this installation does not have: {error}") from None
