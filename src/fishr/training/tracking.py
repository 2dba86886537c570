"""A run told to a tracker while it is made.

``tracking.json`` in the run's folder notes by what name each tracker knows the run, and up to which step it knows its
records. So a run that is continued is continued there too, and no record is told twice but by a process that was killed
before it could note it.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fishr.errors import RunInterruptedError, TrackingError
from fishr.files import write_text
from fishr.records import RunRecord, flat_settings
from fishr.training.config import RunConfig
from fishr.training.observer import Silent
from fishr.training.run_folder import RunFolder
from fishr.training.trackers import TRACKERS, TrackedRun, check_tracker

logger = logging.getLogger(__name__)


class Tracking(Silent):
    """An observer that tells a tracker of a run; as a context manager it tells also how the run ends.

    What cannot be told during the run is warned of, and told again with the next record: training goes on.

    Args:
        tracker: A name in :data:`fishr.training.trackers.TRACKERS`.
        folder: The run.

    Raises:
        ConfigError: there is no such tracker here.
    """

    def __init__(self, tracker: str, folder: RunFolder) -> None:
        check_tracker(tracker)
        self.tracker, self.folder = tracker, folder
        self.run: TrackedRun | None = None
        self.known_step = 0
        self.untold: list[RunRecord] = []
        self.warned = False

    def on_start(self, config: RunConfig, step: int) -> None:
        """Begin, or continue; records that the tracker does not know yet are told now.

        Raises:
            TrackingError: the tracker does not take the run.
        """
        noted = self._notes().get(self.tracker, {"name": None, "step": 0})
        title, settings = _title(config, self.folder.path), flat_settings(config.as_dict())
        try:
            with _as_first_process():
                self.run = TRACKERS[self.tracker](self.folder.path, title, settings, noted["name"], noted["step"])
        except Exception as error:  # packages raise what they like
            anew = f", delete {self.folder.tracking_file} to track the run as a new one" if noted["name"] else ""
            raise TrackingError(
                f"{self.tracker} does not track the run in {self.folder.path} ({type(error).__name__}: {error}): "
                f"mend the cause{anew}, or train without --track"
            ) from error
        self.known_step = self.run.step
        self._note(self.run)
        self.untold = [record for record in self.folder.records() if record.step > self.known_step]
        self._tell()

    def on_record(self, record: RunRecord) -> None:
        if record.step > self.known_step:
            self.untold.append(record)
        self._tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.run is None or (kind is not None and not issubclass(kind, Exception)):  # ^C again: no more waiting
            return
        try:
            with _as_first_process():
                if self.folder.done:
                    self._tell_untold(self.run)
                    kept = self.folder.kept()
                    self.run.add_outcome(_evaluations(kept, self.run, "kept/"), kept.step, self.folder.model)
                    self.run.leave("done")
                else:
                    self.run.leave("stopped" if isinstance(error, RunInterruptedError) else "failed")
            self._note(self.run)
        except Exception as failure:
            self._warn(failure, f"what it misses is in {self.folder.metrics}")

    def _tell(self) -> None:
        assert self.run is not None
        try:
            with _as_first_process():
                self._tell_untold(self.run)
            self.warned = False
        except Exception as error:
            if not self.warned:
                self._warn(error, "training goes on, and it is told again with the next record")
            self.warned = True

    def _tell_untold(self, run: TrackedRun) -> None:
        while self.untold:
            record = self.untold[0]
            run.add(_metrics(record, run), record.step)
            self.known_step = self.untold.pop(0).step
            self._note(run)

    def _warn(self, error: Exception, consequence: str) -> None:
        logger.warning(
            "%s cannot be told of the run in %s (%s: %s): %s",
            self.tracker,
            self.folder.path,
            type(error).__name__,
            error,
            consequence,
        )

    def _note(self, run: TrackedRun) -> None:
        notes = {**self._notes(), self.tracker: {"name": run.name, "step": run.step}}
        write_text(self.folder.tracking_file, json.dumps(notes, indent=2) + "\n")

    def _notes(self) -> dict[str, Any]:
        """What is noted of each tracker."""
        file = self.folder.tracking_file
        try:
            notes: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError:
            raise TrackingError(f"{file} cannot be read: delete it to track the run as a new one") from None
        return notes


@contextmanager
def _as_first_process() -> Iterator[None]:
    """Lightning's loggers are silent in all processes of a job but the first; each of ours has a run of its own."""
    from lightning.pytorch.utilities import rank_zero_only

    rank, rank_zero_only.rank = rank_zero_only.rank, 0  # type: ignore[attr-defined]
    try:
        yield
    finally:
        rank_zero_only.rank = rank  # type: ignore[attr-defined]


def _title(config: RunConfig, folder: Path) -> str:
    """The folder's name; where that is the run's hash, what the run is too."""
    name = folder.resolve().name
    if name != config.hash:
        return name
    held_out = f", held out {', '.join(config.test_domains)}" if config.test_domains else ""
    return f"{config.algorithm} on {config.data}{held_out} ({name})"


def _metrics(record: RunRecord, run: TrackedRun) -> dict[str, float]:
    """All that a record holds."""
    terms = run.spelled(record.losses)
    return {
        **{f"train/{terms[name]}": value for name, value in record.losses.items()},
        **_evaluations(record, run),
        "seconds_per_step": record.seconds_per_step,
    }


def _evaluations(record: RunRecord, run: TrackedRun, prefix: str = "") -> dict[str, float]:
    """Accuracy and loss of each domain and split."""
    domains = run.spelled(record.domains)
    return {
        f"{prefix}{name}/{domains[domain]}/{split}": value
        for domain, splits in record.domains.items()
        for split, metrics in splits.items()
        for name, value in asdict(metrics).items()
    }
