"""The Colored MNIST protocol (Arjovsky and others, arXiv 1907.02893; Rame and others, ICML 2022, section 5.1).

Full-batch training of an MLP by several methods and seeds, on digits whose colour predicts the label in the training
domains and misleads in the unseen one. The demo runs it on Colored Digits, the reproduction on Colored MNIST.

The published accuracies are those of the forward pass before the last of 501 updates; a run here makes 500 updates and
evaluates then, which is the same network.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, Protocol

from fishr.data import MultiDomainDataset, load_dataset
from fishr.deploy import keep_mistakes
from fishr.errors import ConfigError
from fishr.files import write_text
from fishr.models.build import ModelConfig
from fishr.records import RunRecord
from fishr.registry import unknown
from fishr.training import Observer, RunConfig
from fishr.training.config import Precision
from fishr.training.loop import PlannedRun, train_together

UNSEEN, GRAY = "-90%", "gray"

LAYERS = ("classifier", "featurizer", "all")
"""Whose gradients Fishr may compare."""

METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "erm": ("erm", {}),
    "irm": ("irm", {"estimator": "full"}),
    "vrex": ("vrex", {"reduction": "sum"}),
    "fishr": ("fishr", {"ema": 0.0, "reduction": "sum"}),
    "fishr-featurizer": ("fishr", {"ema": 0.0, "reduction": "sum", "layers": "featurizer"}),
    "fishr-all": ("fishr", {"ema": 0.0, "reduction": "sum", "layers": "all"}),
    "fishr-second-moment": ("fishr", {"ema": 0.0, "reduction": "sum", "variant": "second_moment"}),
    "fishr-second-moment-featurizer": (
        "fishr",
        {"ema": 0.0, "reduction": "sum", "variant": "second_moment", "layers": "featurizer"},
    ),
    "fishr-second-moment-all": (
        "fishr",
        {"ema": 0.0, "reduction": "sum", "variant": "second_moment", "layers": "all"},
    ),
    "fishr-covariance": ("fishr", {"variant": "covariance"}),
}
"""Each method's algorithm and the settings that make it the Colored MNIST script's, but for other layers."""

TITLES = {
    "erm": "ERM",
    "irm": "IRM",
    "vrex": "V-REx",
    "fishr": "Fishr",
    "fishr-featurizer": "Fishr, featurizer",
    "fishr-all": "Fishr, all layers",
    "fishr-second-moment": "Fishr, second moment",
    "fishr-second-moment-featurizer": "Fishr, second moment, featurizer",
    "fishr-second-moment-all": "Fishr, second moment, all layers",
    "fishr-covariance": "Fishr, full covariance",
}


@dataclass(frozen=True)
class Setting:
    """What all runs of a job have in common.

    Attributes:
        data: Name of the dataset.
        width: Units of both hidden layers.
        lr: Learning rate of Adam.
        l2: Weight of Σ‖w‖² in the loss.
        penalty_weight: λ from the switch-on step on; 1 before.
        steps: Updates.
        data_options: Further options of the dataset.
        precision: Precision of the hidden layers.
    """

    data: str
    width: int
    lr: float
    l2: float
    penalty_weight: float
    steps: int = 500
    data_options: Mapping[str, Any] = field(default_factory=dict)
    precision: Precision = "32"

    @property
    def switch_on(self) -> int:
        """The published step 190 of 500, or the same share of another length."""
        return round(0.38 * self.steps)


@dataclass(frozen=True)
class MethodRun:
    """Outcome of one method and seed; accuracies in percent.

    Attributes:
        algorithm: Name of the method.
        seed: Seed of data, initial weights and training.
        train_accuracy: Mean over the training domains.
        unseen_accuracy: In the held-out domain, where colour misleads.
        gray_accuracy: On the held-out images without colour.
        seconds_per_step: Mean duration of a training step.
    """

    algorithm: str
    seed: int
    train_accuracy: float
    unseen_accuracy: float
    gray_accuracy: float
    seconds_per_step: float

    @property
    def accuracies(self) -> tuple[float, float, float]:
        return self.train_accuracy, self.unseen_accuracy, self.gray_accuracy


@dataclass(frozen=True)
class Spread:
    """Mean and population standard deviation of each accuracy over a method's runs, in percent."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, runs: Sequence[MethodRun]) -> "Spread":
        columns = list(zip(*(run.accuracies for run in runs), strict=True))
        return cls(tuple(map(fmean, columns)), tuple(map(pstdev, columns)))


class Watcher(Protocol):
    """Somebody who watches a job."""

    def run(self, method: str, seed: int) -> AbstractContextManager[Observer]:
        """Watch one run."""

    def on_result(self, run: MethodRun) -> None:
        """A run is finished."""


def distinct_methods(names: Sequence[str]) -> list[str]:
    """Methods without repetition; raises ConfigError for one that does not exist."""
    for name in names:
        if name not in METHODS:
            raise unknown("method", name, METHODS)
    return list(dict.fromkeys(names))


def on_layers(methods: Sequence[str], layers: Sequence[str]) -> list[str]:
    """Methods without repetition, each of Fishr's once for each choice of layers, the classifier by its plain name.

    Raises:
        ConfigError: a method or layers that do not exist, or do not go together.
    """
    names = []
    for method in distinct_methods(methods):
        for choice in layers if METHODS[method][0] == "fishr" else ["classifier"]:
            if choice not in LAYERS:
                raise unknown("layers", choice, LAYERS)
            name = method if choice == "classifier" else f"{method}-{choice}"
            if name not in METHODS:
                raise ConfigError(
                    f"{method} does not compare the gradients of layers {choice!r}: fishr and fishr-second-moment do"
                )
            names.append(name)
    return list(dict.fromkeys(names))


def run_methods(
    setting: Setting,
    methods: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    watcher: Watcher,
    *,
    data_root: Path | None = None,
    device: str = "auto",
    track: str | None = None,
    stack: bool = False,
) -> list[MethodRun]:
    """Every method with every seed, each a run of its own in ``folder/METHOD-SEED``; done ones are only read.

    With ``stack`` the seeds of a method are trained together (:func:`fishr.training.loop.train_together`).

    Raises:
        ConfigError: a method that does not exist.
        FishrError: as :func:`fishr.training.train`.
    """
    methods = distinct_methods(methods)

    @lru_cache(maxsize=len(seeds) if stack else 1)
    def dataset_of(seed: int) -> MultiDomainDataset:
        return load_dataset(setting.data, root=data_root, seed=seed, **setting.data_options)

    one_by_one = [[(method, seed)] for seed in seeds for method in methods]
    runs = []
    for group in [[(method, seed) for seed in seeds] for method in methods] if stack else one_by_one:
        with ExitStack() as watched:
            planned = [
                PlannedRun(
                    method_config(setting, method, dataset_of(seed), seed),
                    dataset_of(seed),
                    folder / f"{method}-{seed}",
                    watched.enter_context(watcher.run(method, seed)),
                )
                for method, seed in group
            ]
            results = train_together(planned, device=device, track=track)
        for (method, seed), result in zip(group, results, strict=True):
            keep_mistakes(result.folder, dataset_of(seed), device=device)
            run = _outcome(method, seed, result.records)
            runs.append(run)
            watcher.on_result(run)
    return runs


def method_config(setting: Setting, method: str, dataset: MultiDomainDataset, seed: int) -> RunConfig:
    """The config of one method's run."""
    algorithm, own = METHODS[method]
    penalized = {
        "penalty_weight": setting.penalty_weight,
        "switch_on": setting.switch_on,
        "weight_before": 1.0,
        "rescale": True,
        "reset_optimizer": False,
    }
    hparams = {"lr": setting.lr, "l2": setting.l2, "batch_size": None, **own}
    return RunConfig.for_dataset(
        dataset,
        algorithm,
        steps=setting.steps,
        hparams=hparams if algorithm == "erm" else hparams | penalized,
        model=ModelConfig("mlp", {"width": setting.width, "depth": 2}, init="xavier"),
        checkpoint_every=max(1, setting.steps // 5),
        seed=seed,
        out_fraction=0.0,
        precision=setting.precision,
    )


def summaries(runs: Sequence[MethodRun]) -> dict[str, Spread]:
    """Spread of each method's runs, methods in order of appearance."""
    return {method: Spread.of([run for run in runs if run.algorithm == method]) for method in _methods_of(runs)}


def write_results(folder: Path, runs: Sequence[MethodRun], setting: Setting) -> dict[str, Any]:
    """Write ``results.json`` into the folder; returns its content."""
    names = ("train_accuracy", "unseen_accuracy", "gray_accuracy")
    content = {
        "runs": [asdict(run) for run in runs],
        "summary": {
            method: {
                name: {"mean": mean, "std": std} for name, mean, std in zip(names, spread.mean, spread.std, strict=True)
            }
            for method, spread in summaries(runs).items()
        },
        "setting": asdict(setting),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("fishr", "torch")}},
    }
    write_text(folder / "results.json", json.dumps(content, indent=2) + "\n")
    return content


def _methods_of(runs: Sequence[MethodRun]) -> list[str]:
    return list(dict.fromkeys(run.algorithm for run in runs))


def _outcome(method: str, seed: int, records: Sequence[RunRecord]) -> MethodRun:
    accuracy = {domain: splits["in"].accuracy * 100 for domain, splits in records[-1].domains.items()}
    trained_on = [value for domain, value in accuracy.items() if domain not in (UNSEEN, GRAY)]
    return MethodRun(
        algorithm=method,
        seed=seed,
        train_accuracy=fmean(trained_on),
        unseen_accuracy=accuracy[UNSEEN],
        gray_accuracy=accuracy[GRAY],
        seconds_per_step=fmean(record.seconds_per_step for record in records),
    )
