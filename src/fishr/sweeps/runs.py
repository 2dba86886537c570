"""One run of a sweep, as a process of any executor makes it."""

import json
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from fishr.data.base import MultiDomainDataset
from fishr.deploy import keep_mistakes
from fishr.errors import FishrError, RunBusyError, RunInterruptedError
from fishr.files import write_text
from fishr.records import FAILED_FILE
from fishr.sweeps.grid import Source
from fishr.training import RunConfig, train


@dataclass(frozen=True)
class Order:
    """A run to make.

    Attributes:
        config: The run.
        source: Where its data come from.
        folder: Where it is to lie.
        weights: File with initial weights, where the config names one by its digest.
        device: As :func:`fishr.training.train` takes it.
        keep_model: Likewise.
        track: Likewise.
    """

    config: RunConfig
    source: Source
    folder: Path
    weights: Path | None = None
    device: str = "auto"
    keep_model: bool = False
    track: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        weights = None if self.weights is None else str(self.weights)
        return asdict(self) | {"config": self.config.as_dict(), "folder": str(self.folder), "weights": weights}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`as_dict`."""
        weights = content["weights"]
        return cls(
            **{
                **content,
                "config": RunConfig.from_dict(content["config"]),
                "source": Source(**content["source"]),
                "folder": Path(content["folder"]),
                "weights": None if weights is None else Path(weights),
            }
        )


@dataclass(frozen=True)
class Outcome:
    """What became of an order.

    Attributes:
        state: ``"busy"``: another process works on it; ``"stopped"``: a signal came, and what was done is saved;
            ``"ready"``: of no order, a process has started.
        reason: Of a failure, a line.
    """

    state: Literal["ready", "done", "failed", "busy", "stopped"]
    reason: str = ""


class SweepObserver(Protocol):
    """Somebody who watches a sweep."""

    def on_start(self, order: Order) -> None:
        """A run is given to a process, or to the cluster."""

    def on_outcome(self, order: Order, outcome: Outcome) -> None:
        """A run is done or has failed."""

    def on_retry(self, order: Order, reason: str) -> None:
        """The process of a run has died, and another one will continue the run."""


def make_run(order: Order) -> Outcome:
    """Make the run, or what is missing of it. A failure is written into its folder, and is no failure of the caller."""
    try:
        dataset = _dataset(json.dumps(asdict(order.source)))
        train(
            order.config,
            dataset,
            order.folder,
            weights=order.weights,
            device=order.device,
            keep_model=order.keep_model,
            track=order.track,
        )
    except RunBusyError:
        return Outcome("busy")
    except RunInterruptedError:
        return Outcome("stopped")
    except Exception as error:
        reason = str(error) if isinstance(error, FishrError) else f"{type(error).__name__}: {error}"
        return note_failure(order.folder, reason, traceback.format_exc())
    (order.folder / FAILED_FILE).unlink(missing_ok=True)
    if (order.folder / "model").exists():
        keep_mistakes(order.folder, dataset, device=order.device)
    return Outcome("done")


def note_failure(folder: Path, reason: str, details: str = "") -> Outcome:
    """Write into a run's folder why it failed; the last line is the reason."""
    reason = " ".join(reason.split())
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / FAILED_FILE, f"{details}{reason}\n")
    return Outcome("failed", reason)


@lru_cache(maxsize=1)
def _dataset(source: str) -> MultiDomainDataset:
    """The data of a source, given as JSON; those of the last run are kept for the next one."""
    return Source(**json.loads(source)).load()
