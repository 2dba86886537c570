"""An analysis of one model, or of two, on their data: head, deeper layers, checkpoints, landscapes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from fishr.analysis.agreement import Distances, Halves, correlation, distances, outlier_sentence
from fishr.analysis.head import head_statistics
from fishr.analysis.inconsistency import Inconsistency, diagonal_inconsistency, exact_inconsistency
from fishr.analysis.landscape import Line, Plane, line_between, plane_around
from fishr.analysis.layers import LayerEstimator, layer_statistics, parameters_of
from fishr.analysis.statistics import QUANTITIES, Quantity, Statistics, pooled
from fishr.data.base import MultiDomainDataset, Samples
from fishr.deploy.evaluate import Role, domain_roles, samples_for
from fishr.devices import torch_device
from fishr.errors import ConfigError, DataError
from fishr.models.saved import SavedModel, load_model
from fishr.training.run_folder import snapshots_of

FORMAT = 1

HEAD = "classifier"

EPSILON = 0.01

LANDSCAPE_SAMPLES = 500
"""Samples of each domain that landscapes are made of, which take many passes."""

_HALVES, _LANDSCAPE, _DIRECTIONS, _SIGNS = 0, 1, 2, 3
"""Added to four times the seed, so that no two uses of it share random numbers."""


@dataclass(frozen=True, eq=False)
class LayerAnalysis:
    """Some of a network's weights: their gradients and their curvature in each domain.

    Attributes:
        layer: Name of the layer.
        parameters: Shape of each of its parameters, in the order of the statistics.
        hessian: How the Hessian's diagonal came about.
        halves: Of each domain, the statistics of two halves of its samples, drawn at random.
    """

    layer: str
    parameters: Mapping[str, tuple[int, ...]]
    hessian: str
    halves: Mapping[str, Halves]

    @cached_property
    def domains(self) -> dict[str, Statistics]:
        """The statistics of each domain."""
        return {name: pooled(halves) for name, halves in self.halves.items()}

    def distances(self, quantity: Quantity) -> Distances:
        """Distances of a quantity between all pairs of domains, in their order."""
        return distances(list(self.halves.values()), quantity)

    def inconsistency(self, epsilon: float) -> Inconsistency:
        """Inconsistency of the domains by the Hessians' diagonals.

        Args:
            epsilon: ε, in nats.
        """
        return diagonal_inconsistency(self._risks, [one.hessian for one in self.domains.values()], epsilon)

    def exact_inconsistency(self, epsilon: float) -> Inconsistency | None:
        """Inconsistency of the domains by the whole Hessians; None where these are too large to form.

        Args:
            epsilon: ε, in nats.
        """
        whole = [one.whole_hessian for one in self.domains.values() if one.whole_hessian is not None]
        return exact_inconsistency(self._risks, whole, epsilon) if whole else None

    @property
    def _risks(self) -> list[float]:
        return [one.risk for one in self.domains.values()]

    def outlier(self) -> str:
        """Which domain is the outlier by what Fishr matches, in one sentence."""
        return outlier_sentence(list(self.halves), self.distances("variance"), "gradient variances")

    def as_dict(self, epsilon: float) -> dict[str, Any]:
        """Plain values; matrices are ``[domain, domain]``."""
        return {
            "layer": self.layer,
            "weights": sum(map(prod, self.parameters.values())),
            "hessian": self.hessian,
            "domains": {
                name: {
                    "samples": statistics.samples,
                    "risk": statistics.risk,
                    "accuracy": statistics.accuracy,
                    "norms": {quantity: statistics.of(quantity).norm().item() for quantity in QUANTITIES},
                    "correlation": correlation(statistics),
                }
                for name, statistics in self.domains.items()
            },
            "distances": {quantity: _plain(self.distances(quantity)) for quantity in QUANTITIES},
            "outlier": self.outlier(),
            "inconsistency": {
                "diagonal": _inconsistency(self.inconsistency(epsilon)),
                "exact": _inconsistency(self.exact_inconsistency(epsilon)),
            },
        }

    def rows(self) -> pa.Table:
        """A row for each weight and domain."""
        size = sum(map(prod, self.parameters.values()))
        names = [name for name, shape in self.parameters.items() for _ in range(prod(shape))]
        indices = [index for shape in self.parameters.values() for index in range(prod(shape))]
        tables = []
        for domain, statistics in self.domains.items():
            columns = {
                "parameter": pa.array(names).dictionary_encode(),
                "index": pa.array(indices, pa.int64()),
                "domain": pa.array([domain] * size).dictionary_encode(),
            }
            columns |= {quantity: pa.array(statistics.of(quantity).numpy()) for quantity in QUANTITIES}
            tables.append(pa.table(columns))
        return pa.concat_tables(tables).unify_dictionaries()


@dataclass(frozen=True, eq=False)
class ModelAnalysis:
    """One model.

    Attributes:
        name: Where it lies.
        roles: What the domains were in its training; empty where the data are not those of its training.
        head: Its linear head.
        layers: Deeper layers that were asked for.
        checkpoints: The head at each snapshot of its run, by step.
        plane: The random plane through its weights, if that was asked for.
    """

    name: str
    roles: Mapping[str, Role]
    head: LayerAnalysis
    layers: Sequence[LayerAnalysis]
    checkpoints: Mapping[int, Mapping[str, Any]]
    plane: Plane | None


@dataclass(frozen=True, eq=False)
class Analysis:
    """One model or two, on the same data.

    Attributes:
        data: Name of the dataset.
        epsilon: ε of the inconsistency score, in nats.
        models: The models.
        line: Risks along the line from the first to the second.
    """

    data: str
    epsilon: float
    models: Sequence[ModelAnalysis]
    line: Line | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, which :mod:`fishr.reports.analysis` tells and draws."""
        return {
            "format": FORMAT,
            "data": self.data,
            "epsilon": self.epsilon,
            "models": [
                {
                    "name": model.name,
                    "roles": dict(model.roles),
                    "head": model.head.as_dict(self.epsilon),
                    "layers": [layer.as_dict(self.epsilon) for layer in model.layers],
                    "checkpoints": [{"step": step, "head": head} for step, head in model.checkpoints.items()],
                    "plane": None if model.plane is None else _landscape(model.plane),
                }
                for model in self.models
            ],
            "line": None if self.line is None else _landscape(self.line),
        }

    def weights(self) -> pa.Table:
        """A row for each model, weight and domain: parameter, index in it, the four quantities."""
        tables = []
        for model in self.models:
            for layer in (model.head, *model.layers):
                rows = layer.rows()
                tables.append(rows.add_column(0, "model", pa.array([model.name] * len(rows)).dictionary_encode()))
        return pa.concat_tables(tables).unify_dictionaries()


def analyze(
    models: Sequence[Path | str],
    dataset: MultiDomainDataset,
    *,
    layers: Sequence[str] = (),
    memory: int = 1024,
    draws: int = 16,
    plane: bool = False,
    epsilon: float = EPSILON,
    seed: int = 0,
    batch_size: int = 64,
    device: str = "auto",
    progress: Callable[[str], None] = lambda stage: None,
) -> Analysis:
    """Compare what the domains of a dataset are like for a model, or for two.

    Of the linear head everything is exact. A run that kept snapshots is also followed over its checkpoints; two models
    of the same architecture also have the line between them.

    Args:
        models: Folders of one or two models, or of their runs.
        dataset: The data, with at least two domains; :func:`fishr.deploy.evaluate.load_data_for` loads them.
        layers: Names of modules, such as ``featurizer.1``, or of parameters, to analyse besides the head.
        memory: Bound on what these may take, in MiB.
        draws: Random vectors by which the diagonal of their Hessians is estimated.
        plane: Whether to evaluate risks in a random plane, which takes 121 passes over some samples.
        epsilon: ε of the inconsistency score, in nats.
        seed: Seed of halves, samples for landscapes, planes and estimates.
        batch_size: Samples that go through the network together.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
        progress: Is told what is done next.

    Raises:
        DataError: fewer than two domains, a domain of one sample, or data that do not fit the models; a folder that is
            no model; two models of different architectures.
        ConfigError: a setting out of range, a layer that does not exist or needs more memory, or layers of a model
            whose predictions depend on the batch.
    """
    _check(models, dataset, epsilon, batch_size)
    estimator = LayerEstimator(memory, draws, 4 * seed + _SIGNS)
    loaded = {str(folder): _load(folder, device) for folder in models}
    analysed = []
    for name, model in loaded.items():
        domains = samples_for(model.card, dataset)
        halves = {domain: _halves(samples, 4 * seed + _HALVES) for domain, samples in domains.items()}
        progress(f"the head of {name}")
        head = _head(model, halves, batch_size)
        deeper = [_layer(model, layer, halves, estimator, progress) for layer in layers]
        checkpoints = {}
        for step, folder in snapshots_of(Path(name)).items():
            progress(f"step {step} of {name}")
            checkpoints[step] = _head(_load(folder, device), halves, batch_size).as_dict(epsilon)
        around = None
        if plane:
            progress(f"the plane around {name}")
            around = plane_around(model, _some(domains, seed), 4 * seed + _DIRECTIONS)
        analysed.append(ModelAnalysis(name, domain_roles(model.card, dataset), head, deeper, checkpoints, around))
    line = None
    if len(loaded) == 2:
        progress("the line between the models")
        first, second = loaded.values()
        line = line_between(first, second, _some(samples_for(first.card, dataset), seed))
    return Analysis(dataset.name, epsilon, analysed, line)


def _check(models: Sequence[Path | str], dataset: MultiDomainDataset, epsilon: float, batch_size: int) -> None:
    if len(set(map(str, models))) != len(models) or len(models) not in (1, 2):
        raise ConfigError(f"give one model, or two different ones, got {', '.join(map(str, models)) or 'none'}")
    if len(dataset.domains) < 2:
        raise DataError(
            f"an analysis compares domains, and {dataset.name!r} has but one, {next(iter(dataset.domains))!r}"
        )
    for name, samples in dataset.domains.items():
        if len(samples.targets) < 2:
            raise DataError(f"domain {name!r} of {dataset.name!r} has one sample; at least 2 are needed")
    if epsilon < 0 or batch_size < 1:
        raise ConfigError(f"epsilon must be at least 0 and batch_size at least 1, got {epsilon} and {batch_size}")


def _load(folder: Path | str, device: str) -> SavedModel:
    return load_model(folder).requires_grad_(False).to(torch_device(device))


def _head(model: SavedModel, halves: Mapping[str, tuple[Samples, Samples]], batch_size: int) -> LayerAnalysis:
    return LayerAnalysis(
        HEAD,
        {f"{HEAD}.{name}": tuple(weights.shape) for name, weights in model.classifier.named_parameters()},
        "exact",
        {
            domain: (head_statistics(model, first, batch_size), head_statistics(model, second, batch_size))
            for domain, (first, second) in halves.items()
        },
    )


def _layer(
    model: SavedModel,
    layer: str,
    halves: Mapping[str, tuple[Samples, Samples]],
    estimator: LayerEstimator,
    progress: Callable[[str], None],
) -> LayerAnalysis:
    if model.card.depends_on_batch:
        raise ConfigError(
            f"what the model predicts for a sample depends on its batch, so that {layer} has no gradient of a single "
            "sample: only its head can be analysed"
        )
    parameters = parameters_of(model, layer)
    first = next(iter(halves.values()))[0]
    chunk = estimator.chunk(model, parameters, first.inputs[:1], len(halves))
    statistics = {}
    for domain, (one, other) in halves.items():
        progress(f"{layer} in {domain}, {chunk} samples at a time")
        statistics[domain] = (
            layer_statistics(model, parameters, one, estimator, chunk),
            layer_statistics(model, parameters, other, estimator, chunk),
        )
    shapes = {name: tuple(model.get_parameter(name).shape) for name in parameters}
    return LayerAnalysis(layer, shapes, f"Hutchinson's estimate of {estimator.draws} draws", statistics)


def _halves(samples: Samples, seed: int) -> tuple[Samples, Samples]:
    order = torch.randperm(len(samples.targets), generator=torch.Generator().manual_seed(seed))
    middle = len(order) // 2
    return samples.subset(order[:middle].sort().values), samples.subset(order[middle:].sort().values)


def _some(domains: Mapping[str, Samples], seed: int) -> dict[str, Samples]:
    """Samples of each domain for landscapes, in memory."""
    chosen = {}
    for name, samples in domains.items():
        generator = torch.Generator().manual_seed(4 * seed + _LANDSCAPE)
        order = torch.randperm(len(samples.targets), generator=generator)[:LANDSCAPE_SAMPLES]
        chosen[name] = Samples(samples.inputs[order], samples.targets[order])
    return chosen


def _plain(of: Distances) -> dict[str, Any]:
    return {"distance": of.distance.tolist(), "sampling": of.sampling.tolist(), "relative": of.relative.tolist()}


def _inconsistency(of: Inconsistency | None) -> dict[str, Any] | None:
    return None if of is None else {"gaps": of.gaps.tolist(), "ratios": of.ratios.tolist()}


def _landscape(of: Line | Plane) -> dict[str, Any]:
    risks = {name: values.tolist() for name, values in of.risks.items()}
    return {"positions": of.positions.tolist(), "risks": risks}
