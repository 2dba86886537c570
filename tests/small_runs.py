"""Small runs that tests share: data, networks in which random numbers matter, configs, and what a run left.

It is a module of its own because processes that are to be killed import it too.
"""

import signal
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fishr.algorithms import ERM, Losses
from fishr.data import DomainBatch, MultiDomainDataset, Samples, load_dataset
from fishr.models import FEATURIZERS, ModelConfig
from fishr.records import RunRecord, read_records
from fishr.registry import Registry
from fishr.training import AverageConfig, RunConfig
from fishr.training.loop import Silent

STEPS, CHECKPOINT_EVERY, SWITCH_ON = 12, 4, 6

PENALTY = {"penalty_weight": 3.0, "switch_on": SWITCH_ON}
RUNS: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "erm": ("erm", {}, "32"),
    "irm": ("irm", PENALTY, "32"),
    "vrex": ("vrex", PENALTY, "32"),
    "fishr": ("fishr", {**PENALTY, "ema": 0.9}, "32"),
    "fishr-strength": ("fishr", {"strength": 0.5, "switch_on": SWITCH_ON, "ema": 0.9}, "32"),
    "fishr-bf16": ("fishr", {**PENALTY, "ema": 0.9}, "bf16-mixed"),
}
"""Name to algorithm, hyperparameters and precision."""


class NoisyMLP(nn.Sequential):
    """A featurizer with dropout, so that random numbers matter, and with the buffers of batch normalization."""

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        super().__init__(nn.Linear(*input_shape, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU())
        self.num_features = 8


class NoisyCNN(nn.Sequential):
    """The same for images."""

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        convolution = nn.Conv2d(input_shape[0], 4, 3, stride=2)
        super().__init__(
            convolution, nn.BatchNorm2d(4), nn.Dropout(0.3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.num_features = 16


class Recorded(ERM):
    """ERM that keeps featurizer and head as they are after each update; those of step i are ``trajectory[i - 1]``."""

    trajectory: list[dict[str, Tensor]]

    def training_step(self, batch: DomainBatch, step: int, optimizers: Mapping[str, Any]) -> Losses:
        losses = super().training_step(batch, step, optimizers)
        self.trajectory.append({name: value.clone() for name, value in self.state_dict().items()})
        return losses


@contextmanager
def registered(registry: Registry[Any], name: str, item: object) -> Iterator[None]:
    """A name that is known inside the block."""
    registry.register(name, item)
    try:
        yield
    finally:
        del registry._items[name]


@contextmanager
def noisy_registered() -> Iterator[None]:
    with registered(FEATURIZERS, "noisy", NoisyMLP), registered(FEATURIZERS, "noisy-cnn", NoisyCNN):
        yield


# Data


def numbered(size: int = 10) -> MultiDomainDataset:
    """Domains "a", "b", "c" (held out) and "extra" (for evaluation only); sample i of domain d is (d, i)."""
    domains = {}
    for domain, name in enumerate(("a", "b", "c", "extra")):
        places = torch.arange(size)
        inputs = torch.stack([torch.full_like(places, domain), places], 1).float()
        domains[name] = Samples(inputs, places % 2)
    return MultiDomainDataset(
        "numbered", "vectors", domains, ("even", "odd"), "c", evaluation_only=frozenset({"extra"})
    )


def numbered_config(algorithm: str = "erm", **changes: Any) -> RunConfig:
    settings: dict[str, Any] = {"steps": 30, "checkpoint_every": 10, **changes}
    return RunConfig.for_dataset(numbered(), algorithm, **settings)


def picture(name: str, size: int = 20) -> Image.Image:
    """Noise of its own for every name."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return Image.fromarray(generator.integers(0, 256, (size, size + 4, 3), dtype=np.uint8))


def write_pictures(
    folder: Path,
    domains: tuple[str, ...] = ("lab", "shop", "street"),
    classes: tuple[str, ...] = ("cat", "dog"),
    each: int = 12,
) -> Path:
    """A folder DOMAIN/CLASS/image; the same wherever it lies."""
    for domain in domains:
        for name in classes:
            (folder / domain / name).mkdir(parents=True)
            for index in range(each):
                picture(f"{domain} {name} {index}").save(folder / domain / name / f"{index:02}.png")
    return folder


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


PICTURE_RUNS: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "fishr": {"algorithm": "fishr", "hparams": {**PENALTY, "dropout": 0.1}},
    "class-balanced": {"class_balanced": True},
    "sma": {"average": AverageConfig("sma", {"start": 5})},
    "ema": {"average": AverageConfig("ema", {"decay": 0.7})},
    "swad": {
        "average": AverageConfig("swad", {"n_converge": 2, "n_tolerance": 2, "tolerance": 1.0}),
        "checkpoint_every": 2,
    },
    "select": {"select": True, "checkpoint_every": 2},
    "select-sma": {"select": True, "checkpoint_every": 3, "average": AverageConfig("sma", {"start": 5})},
}
"""Name to what is special about a run on images."""


def picture_config(dataset: MultiDomainDataset, name: str = "plain") -> RunConfig:
    """The config of one of :data:`PICTURE_RUNS`."""
    changes = dict(PICTURE_RUNS[name])
    return RunConfig.for_dataset(
        dataset,
        changes.pop("algorithm", "erm"),
        test_domains=("street",),
        model=ModelConfig("noisy-cnn"),
        seed=3,
        hparams={"batch_size": 4, "lr": 1e-2, **changes.pop("hparams", {})},
        **{"steps": STEPS, "checkpoint_every": CHECKPOINT_EVERY, **changes},
    )


Outcome = tuple[bytes, bytes, list[RunRecord]]


def outcome(folder: Path) -> Outcome:
    """All that a run leaves, but for the time it took; the last record is that of the model kept."""
    records = [*read_records(folder / "metrics.jsonl"), *read_records(folder / "DONE")]
    untimed = [replace(record, seconds_per_step=0) for record in records]
    return (folder / "model/model.safetensors").read_bytes(), (folder / "model/model.json").read_bytes(), untimed


class AtStep(Silent):
    """An observer that does something once so many updates have been made."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.at, self.act = step, act

    def on_step(self, step: int, losses: Mapping[str, float]) -> None:
        if step == self.at:
            self.act()


def signal_at(step: int, number: int = signal.SIGTERM) -> AtStep:
    return AtStep(step, lambda: signal.raise_signal(number))
