"""The runs of a sweep: datasets × algorithms × held-out domains × draws × trials."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path
from typing import Any, Self

import numpy as np

from fishr.algorithms import ALGORITHMS
from fishr.data import is_dataset_name, load_dataset
from fishr.data.base import MultiDomainDataset
from fishr.data.listing import existing_path
from fishr.data.mnist import data_root
from fishr.errors import ConfigError
from fishr.models.build import ModelConfig
from fishr.registry import unknown
from fishr.space import Distribution, LogUniform, draw
from fishr.training import AverageConfig, RunConfig
from fishr.training.config import Precision

STEPS = 5001
CHECKPOINT_EVERY = {"colored-mnist": 100, "rotated-mnist": 100, "domain-net": 1000}
OTHERS_CHECKPOINT_EVERY = 300
BATCH_SIZES: Mapping[str, Distribution] = {"domain-net": LogUniform(2**3, 2**5, integer=True)}
"""DomainBed's protocol (Gulrajani and Lopez-Paz, arXiv 2007.01434): length of runs, and where datasets differ."""


@dataclass(frozen=True)
class Source:
    """How a dataset is loaded: the arguments of :func:`fishr.data.load_dataset`."""

    name: str
    root: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, root: Path | None, options: Mapping[str, Any]) -> Self:
        """With paths that lead to the data from everywhere on a file system."""
        path = None if is_dataset_name(name) else existing_path(name)
        return cls(name if path is None else str(path.resolve()), str(data_root(root).resolve()), options)

    def load(self) -> MultiDomainDataset:
        return load_dataset(self.name, root=self.root, **self.options)


@dataclass(frozen=True)
class Grid:
    """What a sweep is made of.

    Attributes:
        algorithms: Names of the algorithms.
        test_domains: Domains that are held out in turn; None for all.
        draws: Hyperparameter draws of each algorithm; the first are the defaults, the others random.
        trials: Seeds of the splits.
        leave_one_out: Whether pairs of domains are held out too, as leave-one-domain-out selection needs.
        steps: Updates of each run.
        checkpoint_every: Updates between checkpoints; None for the dataset's published number.
        hparams: Hyperparameters that all runs share, of those algorithms that have them.
        precision: As in :class:`fishr.training.RunConfig`, like the two that follow.
        average: How weights are averaged.
        class_balanced: Whether classes are drawn as often.

    Raises:
        ConfigError: an algorithm that does not exist, or a number below one.
    """

    algorithms: tuple[str, ...]
    test_domains: tuple[str, ...] | None = None
    draws: int = 20
    trials: int = 3
    leave_one_out: bool = False
    steps: int = STEPS
    checkpoint_every: int | None = None
    hparams: Mapping[str, Any] = field(default_factory=dict)
    precision: Precision = "32"
    average: AverageConfig | None = None
    class_balanced: bool = False

    def __post_init__(self) -> None:
        for name in self.algorithms:
            ALGORITHMS[name]
        if not self.algorithms:
            raise ConfigError("a sweep needs an algorithm or more")
        numbers = {"draws": self.draws, "trials": self.trials, "steps": self.steps}
        if self.checkpoint_every is not None:
            numbers["checkpoint-every"] = self.checkpoint_every
        few = [f"{name} must be at least 1, got {value}" for name, value in numbers.items() if value < 1]
        if few:
            raise ConfigError("; ".join(few))


def configs(grid: Grid, dataset: MultiDomainDataset, model: ModelConfig | None) -> list[RunConfig]:
    """The runs on one dataset, in an order in which each trial's first draws come first.

    Args:
        grid: The sweep.
        dataset: The dataset.
        model: The network; None for the customary one.

    Raises:
        ConfigError: a domain that cannot be held out, too few of them, or a hyperparameter that no algorithm has.
    """
    _check(grid, dataset)
    held_out = _held_out(grid, dataset)
    return [
        _config(grid, dataset, model, algorithm, domains, number, trial)
        for number, trial, domains, algorithm in product(
            range(grid.draws), range(grid.trials), held_out, dict.fromkeys(grid.algorithms)
        )
    ]


def hyperparameters_of_draw(algorithm: str, dataset: MultiDomainDataset, number: int, trial: int) -> dict[str, Any]:
    """What a draw changes of the defaults: nothing in draw 0, in others all that has a search space.

    A value depends on draw, trial and the hyperparameter's name alone.
    """
    if number == 0:
        return {}
    space = ALGORITHMS[algorithm].Config.space(dataset.kind)
    if "batch_size" in space and dataset.name in BATCH_SIZES:
        space["batch_size"] = BATCH_SIZES[dataset.name]
    return draw(space, number, trial)


def _config(
    grid: Grid,
    dataset: MultiDomainDataset,
    model: ModelConfig | None,
    algorithm: str,
    held_out: tuple[str, ...],
    number: int,
    trial: int,
) -> RunConfig:
    names = ALGORITHMS[algorithm].Config.default(dataset.kind).as_dict()
    given = {name: value for name, value in grid.hparams.items() if name in names}
    customary = CHECKPOINT_EVERY.get(dataset.name, OTHERS_CHECKPOINT_EVERY)
    return RunConfig.for_dataset(
        dataset,
        algorithm,
        steps=grid.steps,
        test_domains=held_out,
        hparams=hyperparameters_of_draw(algorithm, dataset, number, trial) | given,
        model=model,
        checkpoint_every=min(customary, grid.steps) if grid.checkpoint_every is None else grid.checkpoint_every,
        seed=int(np.random.SeedSequence((number, trial)).generate_state(1)[0]),
        trial=trial,
        precision=grid.precision,
        average=grid.average,
        class_balanced=grid.class_balanced,
        draw=number,
    )


def _held_out(grid: Grid, dataset: MultiDomainDataset) -> list[tuple[str, ...]]:
    """Each domain to hold out alone, and where pairs are asked for with each other one."""
    domains = dataset.trainable_domains
    chosen = domains if grid.test_domains is None else grid.test_domains
    for name in chosen:
        if name not in domains:
            raise unknown(f"test domain of {dataset.name!r}", name, domains)
    alone = [(name,) for name in domains if name in chosen]
    pairs = [pair for pair in combinations(domains, 2) if set(pair) & set(chosen)]
    return [*alone, *pairs] if grid.leave_one_out else [*alone]


def _check(grid: Grid, dataset: MultiDomainDataset) -> None:
    """Check that the algorithms can be trained on the dataset, and have the hyperparameters given.

    Raises:
        ConfigError: they cannot, or have not.
    """
    left_out = 2 if grid.leave_one_out else 1
    for name in grid.algorithms:
        needed = ALGORITHMS[name].min_domains + left_out
        if len(dataset.trainable_domains) < needed:
            raise ConfigError(
                f"{name} needs {needed} domains, {left_out} of them held out; dataset {dataset.name!r} has "
                f"{len(dataset.trainable_domains)}: {', '.join(dataset.trainable_domains)}"
            )
    known = {
        name for algorithm in grid.algorithms for name in ALGORITHMS[algorithm].Config.default(dataset.kind).as_dict()
    }
    for name in grid.hparams:
        if name not in known:
            raise unknown(f"hyperparameter of {', '.join(grid.algorithms)}", name, known)
