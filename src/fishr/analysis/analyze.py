"""An analysis of one model, or of two, on their data: head, deeper layers, checkpoints, landscapes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from fishr.analysis.agreement import Distances, correlation, distances, outlier_sentence
from fishr.analysis.head import head_statistics
from fishr.analysis.inconsistency import DAMPING, Inconsistency, diagonal_inconsistency, exact_inconsistency
from fishr.analysis.landscape import Line, Plane, are_comparable, line_between, plane_around
from fishr.analysis.layers import LayerEstimator, layer_statistics, parameters_of
from fishr.analysis.statistics import DIAGONALS, Quantity, Statistics
from fishr.data.base import MultiDomainDataset, Samples
from fishr.data.images import Images
from fishr.deploy.evaluate import Role, domain_roles, samples_for
from fishr.devices import torch_device
from fishr.errors import ConfigError, DataError
from fishr.models.saved import SavedModel, load_model
from fishr.training.evaluation import BATCH_SIZE as EVALUATION_BATCH_SIZE
from fishr.training.evaluation import IMAGE_BATCH_SIZE
from fishr.training.run_folder import snapshots_of

FORMAT = 1

HEAD = "classifier"

EPSILON, MEMORY, DRAWS = 0.01, 1024, 16
"""Defaults of :func:`analyze`."""

LANDSCAPE_SAMPLES = 500
"""Samples of each domain that landscapes are made of, which take many passes."""

_LANDSCAPE, _DIRECTIONS, _SIGNS = 0x1A4D, 0xD14E, 0x5167
"""Second word of the seeds, so that no two uses share random numbers."""


@dataclass(frozen=True, eq=False)
class LayerAnalysis:
    """Some of a network's weights: their gradients and their curvature in each domain.

    Attributes:
        layer: Name of the layer.
        parameters: Shape of each of its parameters, in the order of the statistics.
        hessian: How the Hessian's diagonal came about.
        domains: The statistics of each domain.
    """

    layer: str
    parameters: Mapping[str, tuple[int, ...]]
    hessian: str
    domains: Mapping[str, Statistics]

    @property
    def num_weights(self) -> int:
        return sum(map(prod, self.parameters.values()))

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """What the statistics are of."""
        return next(iter(self.domains.values())).quantities

    def distances(self, quantity: Quantity) -> Distances:
        """Distances of a quantity between all pairs of domains, in their order."""
        return distances(list(self.domains.values()), quantity)

    def inconsistency(self, epsilon: float, damping: float = DAMPING) -> Inconsistency | None:
        """Inconsistency of the domains by the Hessians' diagonals; None where these are estimates.

        Args:
            epsilon: ε, in nats.
            damping: As :mod:`fishr.analysis.inconsistency` explains.
        """
        statistics = self.domains.values()
        if any(one.hessian_error > 0 for one in statistics):
            return None
        return diagonal_inconsistency(self._risks, [one.hessian for one in statistics], epsilon, damping)

    def exact_inconsistency(self, epsilon: float, damping: float = DAMPING) -> Inconsistency | None:
        """Inconsistency of the domains by the whole Hessians; None where these are too large to form.

        Args:
            epsilon: ε, in nats.
            damping: As :mod:`fishr.analysis.inconsistency` explains.
        """
        whole = [one.whole_hessian for one in self.domains.values() if one.whole_hessian is not None]
        return exact_inconsistency(self._risks, whole, epsilon, damping) if whole else None

    @property
    def _risks(self) -> list[float]:
        return [one.risk for one in self.domains.values()]

    def outlier(self) -> str:
        """Which domain is the outlier by what Fishr matches, in one sentence."""
        return outlier_sentence(list(self.domains), self.distances("variance"), "gradient variances")

    def as_dict(self, epsilon: float) -> dict[str, Any]:
        """Plain values; matrices are ``[domain, domain]``."""
        return {
            "layer": self.layer,
            "weights": self.num_weights,
            "hessian": self.hessian,
            "domains": {
                name: {
                    "samples": statistics.samples,
                    "risk": statistics.risk,
                    "accuracy": statistics.accuracy,
                    "norms": {quantity: statistics.of(quantity).norm().item() for quantity in self.quantities},
                    "correlation": correlation(statistics),
                    "hessian_error": statistics.hessian_error,
                }
                for name, statistics in self.domains.items()
            },
            "distances": {quantity: _plain(self.distances(quantity)) for quantity in self.quantities},
            "outlier": self.outlier(),
            "inconsistency": {
                kind: None if of is None else {"ratios": of.ratios.tolist(), "scores": of.scores.tolist()}
                for kind, of in (
                    ("diagonal", self.inconsistency(epsilon)),
                    ("exact", self.exact_inconsistency(epsilon)),
                )
            },
        }

    def rows(self) -> pa.Table:
        """A row for each weight and domain."""
        sizes = [prod(shape) for shape in self.parameters.values()]
        parameter = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        tables = []
        for index, statistics in enumerate(self.domains.values()):
            columns = {
                "layer": _named(np.zeros(self.num_weights, np.int32), [self.layer]),
                "parameter": _named(parameter, list(self.parameters)),
                "index": pa.array(np.concatenate([np.arange(size) for size in sizes])),
                "domain": _named(np.full(self.num_weights, index, np.int32), list(self.domains)),
            }
            columns |= {quantity: pa.array(statistics.of(quantity).numpy()) for quantity in DIAGONALS}
            tables.append(pa.table(columns))
        return pa.concat_tables(tables)


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

    @property
    def compared(self) -> list[str]:
        """The domains that training could align: those that all models were trained on; all, if these are not two."""
        names = list(self.models[0].head.domains)
        trained_on = [name for name in names if all(model.roles.get(name) == "trained on" for model in self.models)]
        return trained_on if len(trained_on) > 1 else names

    def as_dict(self) -> dict[str, Any]:
        """Plain values, which :mod:`fishr.reports.analysis` tells and draws."""
        return {
            "format": FORMAT,
            "data": self.data,
            "epsilon": self.epsilon,
            "damping": DAMPING,
            "compared": self.compared,
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
        """A row for each model, weight and domain: layer, parameter, index in it, the four quantities."""
        tables = []
        for index, model in enumerate(self.models):
            for layer in (model.head, *model.layers):
                rows = layer.rows()
                codes = np.full(len(rows), index, np.int32)
                tables.append(rows.add_column(0, "model", _named(codes, [one.name for one in self.models])))
        return pa.concat_tables(tables).unify_dictionaries()


def analyze(
    models: Sequence[Path | str],
    dataset: MultiDomainDataset,
    *,
    layers: Sequence[str] = (),
    memory: int = MEMORY,
    draws: int = DRAWS,
    plane: bool = False,
    epsilon: float = EPSILON,
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    progress: Callable[[str], None] = lambda stage: None,
) -> Analysis:
    """Compare what the domains of a dataset are like for a model, or for two.

    Of the linear head everything is computed in closed form. A run that kept snapshots is also followed over its
    checkpoints; two models of the same architecture and classes also have the line between them.

    Args:
        models: Folders of one or two models, or of their runs.
        dataset: The data, with at least two domains; :func:`fishr.deploy.evaluate.load_data_for` loads them.
        layers: Names of modules, such as ``featurizer.1``, or of parameters, to analyse besides the head.
        memory: Bound on what these may take, in MiB.
        draws: Random vectors by which the diagonal of their Hessians is estimated, at least 2.
        plane: Whether to evaluate risks in a random plane, which takes 121 passes over some samples.
        epsilon: ε of the inconsistency score, in nats.
        seed: Seed of the samples for landscapes, of planes and of estimates.
        batch_size: Samples that go through the network together, at most. Default: 64 images, 1,024 of other inputs.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
        progress: Is told what is done next.

    Raises:
        DataError: fewer than two domains, a domain of one sample, data that do not fit the models, a loss that is not
            finite, or a folder that is no model.
        ConfigError: a setting out of range, a layer that does not exist, overlaps with another one or needs more
            memory, or layers of a model whose predictions depend on the batch.
    """
    first_inputs = next(iter(dataset.domains.values())).inputs
    if batch_size is None:
        batch_size = IMAGE_BATCH_SIZE if isinstance(first_inputs, Images) else EVALUATION_BATCH_SIZE
    _check(models, dataset, epsilon, batch_size, seed)
    estimator = LayerEstimator(memory, draws, _seed_of(seed, _SIGNS))
    loaded = {str(folder): _load(folder, device) for folder in models}
    # What may be wrong is found before anything takes long.
    samples = {name: samples_for(model.card, dataset) for name, model in loaded.items()}
    planned = {name: _plan(model, layers) for name, model in loaded.items()}
    held = len(dataset.domains) * sum(_num_weights(model, planned[name]) for name, model in loaded.items())
    chunks = {
        (name, layer): min(batch_size, estimator.chunk(model, parameters, first_inputs[:1], held))
        for name, model in loaded.items()
        for layer, parameters in planned[name].items()
    }
    analysed = []
    for name, model in loaded.items():
        progress(f"the head of {name}")
        head = _head(model, samples[name], batch_size)
        deeper = []
        for layer, parameters in planned[name].items():
            statistics = {}
            for domain, of_domain in samples[name].items():
                progress(f"{layer} of {name} in {domain}")
                statistics[domain] = layer_statistics(model, parameters, of_domain, estimator, chunks[name, layer])
            shapes = {parameter: tuple(model.get_parameter(parameter).shape) for parameter in parameters}
            deeper.append(LayerAnalysis(layer, shapes, f"Hutchinson's estimate of {draws} draws", statistics))
        checkpoints = {}
        for step, folder in snapshots_of(Path(name)).items():
            progress(f"step {step} of {name}")
            checkpoints[step] = _head(_load(folder, device), samples[name], batch_size).as_dict(epsilon)
        around = None
        if plane:
            progress(f"the plane around {name}")
            around = plane_around(model, _some(samples[name], seed), _generator(seed, _DIRECTIONS), batch_size)
        analysed.append(ModelAnalysis(name, domain_roles(model.card, dataset), head, deeper, checkpoints, around))
    line = None
    if len(loaded) == 2:
        first, second = loaded.values()
        if are_comparable(first, second):
            progress("the line between the models")
            line = line_between(first, second, _some(samples[str(models[0])], seed), batch_size)
    return Analysis(dataset.name, epsilon, analysed, line)


def _check(
    models: Sequence[Path | str], dataset: MultiDomainDataset, epsilon: float, batch_size: int, seed: int
) -> None:
    if len(set(map(str, models))) != len(models) or len(models) not in (1, 2):
        raise ConfigError(f"give one model, or two different ones, got {', '.join(map(str, models)) or 'none'}")
    if len(dataset.domains) < 2:
        raise DataError(
            f"an analysis compares domains, and {dataset.name!r} has but one, {next(iter(dataset.domains))!r}"
        )
    for name, samples in dataset.domains.items():
        if len(samples.targets) < 2:
            raise DataError(f"domain {name!r} of {dataset.name!r} has one sample; at least 2 are needed")
    if not epsilon >= 0 or batch_size < 1 or seed < 0:
        raise ConfigError(
            f"epsilon and seed must be at least 0 and batch_size at least 1, got {epsilon}, {seed} and {batch_size}"
        )


def _load(folder: Path | str, device: str) -> SavedModel:
    return load_model(folder).requires_grad_(False).to(torch_device(device))


def _plan(model: SavedModel, layers: Sequence[str]) -> dict[str, list[str]]:
    """The parameters of each layer that is asked for."""
    planned = {layer: parameters_of(model, layer) for layer in layers}
    if planned and model.card.depends_on_batch:
        raise ConfigError(
            "what the model predicts for a sample depends on its batch, so that no layer but the head has a gradient "
            "of a single sample: leave layers out"
        )
    seen = dict.fromkeys(parameters_of(model, HEAD), HEAD)
    for layer, parameters in planned.items():
        for parameter in parameters:
            if parameter in seen:
                raise ConfigError(
                    f"{parameter} is in {layer} and in {seen[parameter]}: layers must not overlap, and the head is "
                    "analysed anyway"
                )
            seen[parameter] = layer
    return planned


def _num_weights(model: SavedModel, planned: Mapping[str, Sequence[str]]) -> int:
    return sum(model.get_parameter(name).numel() for parameters in planned.values() for name in parameters)


def _head(model: SavedModel, domains: Mapping[str, Samples], batch_size: int) -> LayerAnalysis:
    shapes = {name: tuple(model.get_parameter(name).shape) for name in parameters_of(model, HEAD)}
    statistics = {domain: head_statistics(model, samples, batch_size) for domain, samples in domains.items()}
    return LayerAnalysis(HEAD, shapes, "exact", statistics)


def _some(domains: Mapping[str, Samples], seed: int) -> dict[str, Samples]:
    """Samples of each domain for landscapes, in memory, in a random order."""
    chosen = {}
    for name, samples in domains.items():
        order = torch.randperm(len(samples.targets), generator=_generator(seed, _LANDSCAPE))[:LANDSCAPE_SAMPLES]
        chosen[name] = Samples(samples.inputs[order], samples.targets[order])
    return chosen


def _generator(seed: int, use: int) -> torch.Generator:
    return torch.Generator().manual_seed(_seed_of(seed, use))


def _seed_of(seed: int, use: int) -> int:
    return int(np.random.SeedSequence((seed, use)).generate_state(1, np.uint64)[0] >> 1)


def _named(codes: NDArray[np.int32], names: Sequence[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(names))


def _plain(of: Distances) -> dict[str, Any]:
    sampling = None if of.sampling is None else of.sampling.tolist()
    return {"distance": of.distance.tolist(), "sampling": sampling, "relative": of.relative.tolist()}


def _landscape(of: Line | Plane) -> dict[str, Any]:
    return {
        "positions": of.positions.tolist(),
        "risks": {name: _finite(risk.tolist()) for name, risk in of.risks.items()},
    }


def _finite(values: Any) -> Any:
    """Nested numbers with null for those that are not finite, which JSON does not have."""
    if isinstance(values, list):
        return [_finite(value) for value in values]
    return values if isfinite(values) else None
