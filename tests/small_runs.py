"""Small runs that the tests of training share: a network in which random numbers matter, configs, and what a run left.

It is a module of its own because processes that are to be killed import it too.
"""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from fishr.data import MultiDomainDataset, load_dataset
from fishr.models import FEATURIZERS, ModelConfig
from fishr.records import RunRecord, read_records
from fishr.registry import Registry
from fishr.training import RunConfig
from fishr.training.loop import Silent

STEPS, CHECKPOINT_EVERY, SWITCH_ON = 12, 4, 6

PENALTY = {"penalty_weight": 3.0, "switch_on": SWITCH_ON}
RUNS: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "erm": ("erm", {}, "32"),
    "irm": ("irm", PENALTY, "32"),
    "vrex": ("vrex", PENALTY, "32"),
    "fishr": ("fishr", {**PENALTY, "ema": 0.9}, "32"),
    "fishr-bf16": ("fishr", {**PENALTY, "ema": 0.9}, "bf16-mixed"),
}
"""Name to algorithm, hyperparameters and precision."""


class NoisyMLP(nn.Sequential):
    """A featurizer with dropout, so that random numbers matter, and with the buffers of batch normalization."""

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        super().__init__(nn.Linear(*input_shape, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU())
        self.num_features = 8


@contextmanager
def registered(registry: Registry[Any], name: str, item: object) -> Iterator[None]:
    """A name that is known inside the block."""
    registry.register(name, item)
    try:
        yield
    finally:
        del registry._items[name]


def noisy_registered() -> Any:
    return registered(FEATURIZERS, "noisy", NoisyMLP)


def small_digits() -> MultiDomainDataset:
    return load_dataset("colored-digits", subset=60)


def run_config(name: str = "erm", **changes: Any) -> RunConfig:
    """The config of one of :data:`RUNS`, with changes; ``hparams`` are added to the run's own."""
    algorithm, hparams, precision = RUNS[name]
    settings: dict[str, Any] = {
        "algorithm": algorithm,
        "steps": STEPS,
        "checkpoint_every": CHECKPOINT_EVERY,
        "model": ModelConfig("noisy"),
        "precision": precision,
        "seed": 3,
        **changes,
        "hparams": {"batch_size": 8, "lr": 1e-2, **hparams, **changes.get("hparams", {})},
    }
    data_options = settings.pop("data_options", small_digits().options)
    return replace(RunConfig.for_dataset(small_digits(), **settings), data_options=data_options)


Outcome = tuple[bytes, bytes, list[RunRecord]]


def outcome(folder: Path) -> Outcome:
    """All that a run leaves, but for the time it took."""
    records = [replace(record, seconds_per_step=0) for record in read_records(folder / "metrics.jsonl")]
    return (folder / "model/model.safetensors").read_bytes(), (folder / "model/model.json").read_bytes(), records


class AtStep(Silent):
    """An observer that does something once so many updates have been made."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.at, self.act = step, act

    def on_step(self, step: int, losses: Mapping[str, float]) -> None:
        if step == self.at:
            self.act()


def signal_at(step: int, number: int = signal.SIGTERM) -> AtStep:
    return AtStep(step, lambda: signal.raise_signal(number))
