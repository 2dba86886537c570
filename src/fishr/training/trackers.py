"""TensorBoard, MLflow and Weights & Biases, each by its logger of Lightning; their packages are imported when used."""

import os
import re
import secrets
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from filelock import SoftFileLease

from fishr.errors import ConfigError
from fishr.records import LEASE_SECONDS
from fishr.registry import unknown

if TYPE_CHECKING:
    from mlflow import MlflowClient

Ending = Literal["done", "stopped", "failed"]
"""How a process leaves a run."""


class TrackedRun(Protocol):
    """A run as a tracker has it.

    Args:
        folder: The run's folder.
        title: What people will see of it.
        settings: Its config, without nesting.
        name: By what name the tracker knows the run, if it does: then it is continued.
        step: Up to which step it knows metrics of it.

    Attributes:
        name: By what name the tracker knows the run.
        step: Up to which step it knows metrics, even if this process is killed.
    """

    name: str
    step: int

    def __init__(self, folder: Path, title: str, settings: Mapping[str, Any], name: str | None, step: int) -> None: ...

    def spelled(self, words: Iterable[str]) -> dict[str, str]:
        """How words are written in names of metrics; different ones stay different."""

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        """Add metrics of a step."""

    def add_outcome(self, metrics: Mapping[str, float], step: int, model: Path) -> None:
        """Add metrics of the model kept, and the model where there is one."""

    def leave(self, ending: Ending) -> None:
        """Nothing more is added by this process."""


class TensorBoard:
    """Event files in the run's folder. When a run is continued, TensorBoard hides those of later steps."""

    name = "tensorboard"

    def __init__(self, folder: Path, title: str, settings: Mapping[str, Any], name: str | None, step: int) -> None:
        from lightning.pytorch.loggers import TensorBoardLogger

        self.step = step
        self.settings = dict(settings)
        hidden_from = None if name is None else step + 1
        self.logger = TensorBoardLogger(
            folder, name="", version=self.name, default_hp_metric=False, purge_step=hidden_from
        )
        self.logger.log_hyperparams(self.settings)
        self.logger.save()

    def spelled(self, words: Iterable[str]) -> dict[str, str]:
        return {word: word for word in words}

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        self.logger.log_metrics(metrics, step)
        self.logger.save()
        self.step = step

    def add_outcome(self, metrics: Mapping[str, float], step: int, model: Path) -> None:
        """With the config again, as TensorBoard shows hyperparameters only beside metrics."""
        self.logger.log_hyperparams(self.settings, dict(metrics), step)

    def leave(self, ending: Ending) -> None:
        self.logger.finalize("success" if ending == "done" else "failed")


class MLflow:
    """A run in the store of ``MLFLOW_TRACKING_URI``, else in ``mlflow.db`` beside the run's folder."""

    def __init__(self, folder: Path, title: str, settings: Mapping[str, Any], name: str | None, step: int) -> None:
        import mlflow
        from lightning.pytorch.loggers import MLFlowLogger

        # By default MLflow tries for minutes while training waits.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        given = os.environ.get("MLFLOW_TRACKING_URI")
        beside = folder.resolve().parent
        store = given or f"sqlite:///{beside / 'mlflow.db'}"
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fishr")
        # Processes that make the tables of one database would disturb each other.
        with SoftFileLease(beside / ".mlflow.lock", lease_duration=LEASE_SECONDS):
            client = mlflow.MlflowClient(store)
            _make_experiment(client, experiment, None if given else (beside / "mlartifacts").as_uri())
        self.logger = MLFlowLogger(experiment, run_name=title, tracking_uri=store, run_id=name)
        try:
            self.client: MlflowClient = self.logger.experiment
        finally:
            if not given:  # the logger has made the store that of the whole process
                mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
        assert self.logger.run_id is not None
        self.name, self.step = self.logger.run_id, step
        if name is None:
            self.logger.log_hyperparams(dict(settings))
        else:
            self.client.update_run(name, status="RUNNING")

    def spelled(self, words: Iterable[str]) -> dict[str, str]:
        """With ``_`` for what MLflow does not allow."""
        spelled: dict[str, str] = {}
        for word in words:
            allowed = re.sub(r"[^\w.\- ]", "_", word)
            while allowed in spelled.values():
                allowed += "_"
            spelled[word] = allowed
        return spelled

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        """By the client: the logger's own method removes all letters but a to z."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.name, [Metric(name, value, now, step) for name, value in metrics.items()])
        self.step = step

    def add_outcome(self, metrics: Mapping[str, float], step: int, model: Path) -> None:
        self.add(metrics, step)
        if model.exists():
            self.client.log_artifacts(self.name, str(model), "model")

    def leave(self, ending: Ending) -> None:
        with redirect_stdout(sys.stderr):  # a server's client prints where to look; stdout is for results
            self.logger.finalize({"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[ending])


def _make_experiment(client: "MlflowClient", name: str, artifacts: str | None) -> None:
    from mlflow.exceptions import MlflowException

    if client.get_experiment_by_name(name) is not None:
        return
    try:
        client.create_experiment(name, artifacts)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another machine has just made it
            raise


class WandB:
    """A run of Weights & Biases, whose local files lie in the run's folder, or in ``WANDB_DIR``.

    W&B writes and sends late, and what it has not when the process is killed is lost. So the step advances when the
    process leaves; a server, where there is one, says which it has.
    """

    def __init__(self, folder: Path, title: str, settings: Mapping[str, Any], name: str | None, step: int) -> None:
        import wandb
        from lightning.pytorch.loggers import WandbLogger

        if wandb.run is not None:
            raise RuntimeError(f"the run {wandb.run.name!r} is open in this process: end it by wandb.finish()")
        self.name = name or secrets.token_hex(4)
        self.logger = WandbLogger(
            name=os.environ.get("WANDB_NAME", title),
            save_dir=os.environ.get("WANDB_DIR", folder),
            project=os.environ.get("WANDB_PROJECT", "fishr"),
            id=self.name,
        )
        self.logger.log_hyperparams(dict(settings))
        open_run = self.logger.experiment
        self.step = self.added = open_run.summary.get("trainer/global_step", 0) if open_run.resumed else step

    def spelled(self, words: Iterable[str]) -> dict[str, str]:
        return {word: word for word in words}

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        self.logger.log_metrics(metrics, step)
        self.added = step

    def add_outcome(self, metrics: Mapping[str, float], step: int, model: Path) -> None:
        from wandb import Artifact

        self.add(metrics, step)
        if model.exists():
            artifact = Artifact(f"model-{self.name}", type="model")
            artifact.add_dir(str(model))
            self.logger.experiment.log_artifact(artifact)

    def leave(self, ending: Ending) -> None:
        self.logger.experiment.finish(exit_code=0 if ending == "done" else 1)
        self.step = self.added


TRACKERS: Mapping[str, type[TrackedRun]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}
"""By the names of their packages."""


def check_tracker(name: str) -> None:
    """Check that there is such a tracker here.

    Raises:
        ConfigError: there is none of this name, or its packages are not installed.
    """
    if name not in TRACKERS:
        raise unknown("tracker", name, TRACKERS)
    for package in ("lightning", name):
        found = find_spec(package)
        if found is None or found.origin is None:  # a folder called wandb is no package
            raise ConfigError(f"--track {name} needs the package {package}: pip install 'fishr[tracking]'")
