"""What tests of tracking share: trackers that stay on this machine, and what they know of a run."""

import json
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NOLOAD = "ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning:mlflow"
"""A warning filter: MLflow uses of SQLAlchemy what this will do without one day."""

Points = dict[str, list[tuple[int, float]]]
"""Name of a metric to its steps and values, in the order in which they were told."""


def keep_trackers_local(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """No word leaves this machine, and nothing is written outside of the folder and the runs."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR"):
        patch.delenv(name, raising=False)
    patch.setenv("DO_NOT_TRACK", "true")
    patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    patch.setenv("WANDB_MODE", "offline")
    patch.setenv("WANDB_SILENT", "true")
    for name in ("DATA", "CACHE", "CONFIG"):
        patch.setenv(f"WANDB_{name}_DIR", str(folder / name))


def tensorboard_points(run: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def mlflow_run(run: Path) -> Any:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run.parent / 'mlflow.db'}")
    return client.get_run(json.loads((run / "tracking.json").read_text())["mlflow"]["name"])


def mlflow_points(run: Path) -> Points:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run.parent / 'mlflow.db'}")
    tracked = mlflow_run(run)
    return {
        name: [(metric.step, metric.value) for metric in client.get_metric_history(tracked.info.run_id, name)]
        for name in tracked.data.metrics
    }


def wandb_points(run: Path) -> Points:
    points: Points = defaultdict(list)
    for record in wandb_records(run):
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            step = row["trainer/global_step"]
            for name, value in row.items():
                if not name.startswith("_") and name != "trainer/global_step":
                    points[name].append((step, value))
    return dict(points)


def wandb_records(run: Path) -> Iterator[Any]:
    """What the offline files of a run hold, oldest first."""
    from wandb.proto.wandb_internal_pb2 import Record

    for file in sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.parent.name):
        for content in _log_records(file.read_bytes()):
            record = Record()
            record.ParseFromString(content)
            yield record


def _log_records(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format: blocks of 32 KiB, records that may be cut into fragments."""
    at, parts = 7, b""  # after W&B's own header
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            yield parts
            parts = b""
