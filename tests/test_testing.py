"""The contract tests: every algorithm and dataset keeps the contract, and what breaks it is found."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from fishr.algorithms import ALGORITHMS, ERM, Algorithm, AlgorithmConfig, Losses
from fishr.data import DomainBatch, MultiDomainDataset, Samples
from fishr.data.base import Kind
from fishr.data.colored import colored_digits
from fishr.errors import ContractError
from fishr.models.batch_context import BatchDependent
from fishr.space import Distribution, Uniform
from fishr.testing import check_algorithm, check_dataset


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_every_algorithm_keeps_the_contract(name: str) -> None:
    check_algorithm(ALGORITHMS[name])


# Algorithms that break it: ERM, but for one thing


class KeepsStateInAnAttribute(ERM):
    """A checkpoint does not see what it has counted."""

    def setup(self) -> None:
        self.steps_seen = 0

    def losses(self, batch: DomainBatch, step: int) -> Losses:
        self.steps_seen += 1
        losses = super().losses(batch, step)
        return replace(losses, total=losses.total / self.steps_seen)


class KeepsAGenerator(ERM):
    """Deterministic, but where its generator stands is in no checkpoint."""

    def setup(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def losses(self, batch: DomainBatch, step: int) -> Losses:
        losses = super().losses(batch, step)
        return replace(losses, total=losses.total * torch.rand((), generator=self.generator))


class HidesAnOptimizer(ERM):
    """Its momentum is in no checkpoint."""

    def setup(self) -> None:
        self.hidden = SGD(self.network_parameters, lr=0.05, momentum=0.9)

    def training_step(self, batch: DomainBatch, step: int, optimizers: Mapping[str, Optimizer]) -> Losses:
        return super().training_step(batch, step, {"main": self.hidden})


class DrawsFromElsewhere(ERM):
    """Nobody seeds NumPy's generator."""

    def losses(self, batch: DomainBatch, step: int) -> Losses:
        losses = super().losses(batch, step)
        return replace(losses, total=losses.total * np.random.default_rng().uniform(0.5, 1.0))


class ChangesItsTerms(ERM):
    """A penalty appears halfway."""

    def losses(self, batch: DomainBatch, step: int) -> Losses:
        losses = super().losses(batch, step)
        return replace(losses, terms=losses.terms | ({"penalty": losses.total} if step >= 2 else {}))


class NamesNoRisk(ERM):
    """Its term has another name."""

    def losses(self, batch: DomainBatch, step: int) -> Losses:
        losses = super().losses(batch, step)
        return replace(losses, terms={"loss": losses.total})


class Diverges(ERM):
    """Its loss is infinite at step 1."""

    def losses(self, batch: DomainBatch, step: int) -> Losses:
        losses = super().losses(batch, step)
        return replace(losses, total=losses.total / (1 - step))


class ReturnsManyLosses(ERM):
    """One value for each sample."""

    def losses(self, batch: DomainBatch, step: int) -> Losses:
        losses = super().losses(batch, step)
        return replace(losses, terms={"risk": self.sample_losses(self(batch.inputs), batch.targets)})


class LearnsNothing(ERM):
    """Its gradient is zero."""

    def losses(self, batch: DomainBatch, step: int) -> Losses:
        losses = super().losses(batch, step)
        return replace(losses, total=0 * losses.total)


class TakesEqualDomains(ERM):
    """It stacks domains."""

    def losses(self, batch: DomainBatch, step: int) -> Losses:
        logits = torch.stack(batch.split(self(batch.inputs))).flatten(0, 1)
        risk = self.sample_losses(logits, batch.targets).mean()
        return Losses(risk, {"risk": risk})


class TakesVectors(ERM):
    """It looks at the second of two dimensions."""

    def losses(self, batch: DomainBatch, step: int) -> Losses:
        assert batch.inputs.shape == (len(batch.targets), 6)
        return super().losses(batch, step)


class TakesSeveralLogits(ERM):
    """A single logit is no softmax."""

    def sample_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, targets, reduction="none")


class RoundsItsLogits(ERM):
    """Its head runs in the precision of the featurizer."""

    def logits(self, features: Tensor) -> Tensor:
        with self.autocast():
            logits: Tensor = self.classifier(features)
        return logits


class MovesFrozenWeights(ERM):
    """It decays weights by hand."""

    def training_step(self, batch: DomainBatch, step: int, optimizers: Mapping[str, Optimizer]) -> Losses:
        with torch.no_grad():
            for weights in self.featurizer.parameters():
                weights.mul_(0.999)
        return super().training_step(batch, step, optimizers)


class NeedsGradientsOfWeights(ERM):
    """It asks for gradients of weights that may be frozen."""

    def losses(self, batch: DomainBatch, step: int) -> Losses:
        losses = super().losses(batch, step)
        torch.autograd.grad(losses.total, list(self.featurizer.parameters()), retain_graph=True)
        return losses


class CountsPredictions(ERM):
    """Evaluation changes a buffer."""

    evaluated: Tensor

    def setup(self) -> None:
        self.register_buffer("evaluated", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            self.evaluated += len(inputs)
        return super().forward(inputs)


class NormalisesByTheBatch(ERM):
    """What it predicts for a sample depends on the others."""

    def forward(self, inputs: Tensor) -> Tensor:
        logits = super().forward(inputs)
        return logits - logits.mean(0) if len(logits) > 1 else logits


class PutsALayerBetween(ERM):
    """A layer that no saved model has."""

    def setup(self) -> None:
        self.between = nn.Linear(self.classifier.in_features, self.classifier.in_features)

    def logits(self, features: Tensor) -> Tensor:
        return super().logits(self.between(features.float()))


class AddsAClass(ERM):
    """A logit for none of the classes."""

    def forward(self, inputs: Tensor) -> Tensor:
        logits = super().forward(inputs)
        return logits if logits.shape[1] == 1 else nn.functional.pad(logits, (0, 1))


class TakesOneDomain(ERM):
    """It says that it needs two, and does without."""

    min_domains = 2

    def __init__(self, featurizer: nn.Module, classifier: nn.Linear, num_domains: int, *rest: Any, **named: Any):
        super().__init__(featurizer, classifier, max(2, num_domains), *rest, **named)


class WithoutReference(ERM):
    """It names a paper, not where to find it."""

    reference = "Vapnik 1998"


class WithoutDocstring(ERM):
    pass


@dataclass(frozen=True)
class AcceptsAnything(AlgorithmConfig):
    def problems(self) -> list[str]:
        return []


@dataclass(frozen=True)
class DrawsWhatItRefuses(AlgorithmConfig):
    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        return super().space(kind) | {"dropout": Uniform(1.0, 2.0)}


@dataclass(frozen=True)
class DrawsWhatItHasNot(AlgorithmConfig):
    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        return super().space(kind) | {"momentum": Uniform(0.0, 1.0)}


@dataclass(frozen=True)
class KnowsNoImages(AlgorithmConfig):
    @classmethod
    def default(cls, kind: Kind) -> Self:
        return cls(lr={"vectors": 1e-3, "small_images": 1e-3}[kind])


def with_config(config: type[AlgorithmConfig]) -> type[Algorithm]:
    return type("Configured", (ERM,), {"__doc__": "ERM with another config.", "Config": config})


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (WithoutReference, r"description: reference must be a Reference, got 'Vapnik 1998'$"),
        (WithoutDocstring, r"description: its docstring must say the idea in its first line, then the objective$"),
        (with_config(AcceptsAnything), r"config: the config must refuse lr=-1\.0$"),
        (with_config(DrawsWhatItRefuses), r"config: ConfigError: dropout must lie in \[0, 1\), got 1\.\d+$"),
        (with_config(DrawsWhatItHasNot), r"config: ConfigError: unknown hyperparameter 'momentum'"),
        (with_config(KnowsNoImages), r"config: KeyError: 'images'$"),
        (TakesOneDomain, r"few domains: it must refuse fewer than min_domains=2 domains$"),
        (LearnsNothing, r"learning: with 3 outputs the risk went from (\d\.\d{3}) to \1 in 60 steps, expected below "),
        (Diverges, r"learning: the loss term 'total' must be a finite scalar, at step 1 it is inf$"),
        (
            ReturnsManyLosses,
            r"learning: the loss term 'risk' must be a finite scalar, at step 0 it is of shape \[36\]$",
        ),
        (NamesNoRisk, r"learning: the terms must have a 'risk', got loss$"),
        (
            ChangesItsTerms,
            r"learning: the terms must be the same at every step: before step 2 total, risk, then total, risk, pen",
        ),
        (TakesSeveralLogits, r"learning: IndexError: Target 1 is out of bounds"),
        (
            DrawsFromElsewhere,
            r"determinism: two runs with the same seeds must end with the same bits; differs: algorith",
        ),
        (KeepsStateInAnAttribute, r"resume: a run that was cut after step 3 and resumed .* keep what later steps need"),
        (KeepsAGenerator, r"resume: a run that was cut after step 3 "),
        (HidesAnOptimizer, r"resume: a run that was cut after step 3 "),
        (TakesEqualDomains, r"other data: RuntimeError: stack expects each tensor to be equal size"),
        (TakesVectors, r"other data: AssertionError"),
        (RoundsItsLogits, r"bfloat16: logits must be float32 with a featurizer in bfloat16, got torch.bfloat16$"),
        (MovesFrozenWeights, r"frozen featurizer: weights with requires_grad=False must stay as they are$"),
        (
            NeedsGradientsOfWeights,
            r"other settings: RuntimeError: One of the differentiated Tensors does not requir",
        ),
        (CountsPredictions, r"prediction: evaluation must change no state; differs: algorithm/evaluated$"),
        (NormalisesByTheBatch, r"prediction: a prediction must depend on its sample alone, or the featurizer be a Bat"),
        (PutsALayerBetween, r"prediction: the prediction must be that of classifier\(featurizer\(inputs\)\): nothing "),
        (AddsAClass, r"prediction: logits must be \[sample, class\], got \[36, 4\]$"),
    ],
    ids=lambda value: value.Config.__name__ if getattr(value, "__name__", "") == "Configured" else None,
)
def test_what_breaks_the_contract_is_found(broken: type[Algorithm], message: str) -> None:
    with pytest.raises(ContractError, match=f"^{message}"):
        check_algorithm(broken)


class DependsOnTheBatch(BatchDependent):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.inner(inputs)
        return features - 0.1 * features.mean(0)


class NormalisesOpenly(ERM):
    """As :class:`NormalisesByTheBatch`, but its featurizer says so."""

    def setup(self) -> None:
        self.featurizer = DependsOnTheBatch(self.featurizer)


def test_a_featurizer_may_say_that_it_depends_on_the_batch() -> None:
    check_algorithm(NormalisesOpenly)


def test_it_trains_with_the_config_that_is_given() -> None:
    with pytest.raises(ContractError, match=r"^learning: with 3 outputs the risk went from "):
        check_algorithm(ERM, AlgorithmConfig(lr=1e-9))


def test_a_check_is_an_assertion() -> None:
    with pytest.raises(AssertionError) as caught:
        check_algorithm(with_config(KnowsNoImages))
    assert isinstance(caught.value.__cause__, KeyError)


# Datasets


def test_the_dataset_without_download_keeps_the_contract() -> None:
    check_dataset(colored_digits)


def points(
    seed: int = 0, subset: int | None = None, names: tuple[str, ...] = ("a", "b", "c"), **changes: Any
) -> MultiDomainDataset:
    """A dataset that keeps the contract, but for the changes."""
    generator = torch.Generator().manual_seed(seed)
    domains = {
        name: Samples(torch.randn(5, 2, generator=generator)[:subset], torch.tensor([0, 1, 0, 1, 0])[:subset])
        for name in names
    }
    return MultiDomainDataset("points", "vectors", domains, **{"classes": ("x", "y"), **changes})


def retyped(dataset: MultiDomainDataset, inputs: torch.dtype, targets: torch.dtype) -> MultiDomainDataset:
    domains = {name: Samples(s.inputs[:].to(inputs), s.targets.to(targets)) for name, s in dataset.domains.items()}
    return replace(dataset, domains=domains)


calls = itertools.count()


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            lambda root, seed, subset: points(next(calls), subset),
            r"the same seed must make the same samples, those of domain 'a' differ$",
        ),
        (
            lambda root, seed, subset: points(seed, subset, names=(f"{next(calls)}", "b")),
            r"the same seed must make the same domains$",
        ),
        (
            lambda root, seed, subset: points(seed),
            r"subset=2 must leave at most 2 samples in a domain, 'a' has 5$",
        ),
        (
            lambda root, seed, subset: points(seed, subset, names=("a",)),
            r"DataError: dataset 'points' has 1 domain to train on or hold out \(a\)",
        ),
        (
            lambda root, seed, subset: points(seed, subset, evaluation_only=frozenset("bc")),
            r"DataError: dataset 'points' has 1 domain to train on or hold out \(a\)",
        ),
        (
            lambda root, seed, subset: points(seed, subset, evaluation_only=frozenset("abc")),
            r"DataError: dataset 'points' has 0 domain to train on or hold out",
        ),
        (
            lambda root, seed, subset: points(seed, subset, classes=("x",)),
            r"DataError: targets of domain 'a' of 'points' run from 0 to 1",
        ),
        (
            lambda root, seed, subset: retyped(points(seed, subset), torch.float64, torch.int64),
            r"inputs must be float32 or uint8 and targets int64, those of domain 'a' are torch.float64 and torch.int",
        ),
        (
            lambda root, seed, subset: retyped(points(seed, subset), torch.float32, torch.float32),
            r"inputs must be .* those of domain 'a' are torch.float32 and torch.float32$",
        ),
        (
            lambda root, seed, subset: dict(points(seed, subset).domains),
            r"it must return a MultiDomainDataset, got dict$",
        ),
        (lambda root, seed: points(seed), r"TypeError: .*unexpected keyword argument 'subset'$"),
    ],
)
def test_what_breaks_the_contract_of_datasets_is_found(
    factory: Callable[..., MultiDomainDataset], message: str
) -> None:
    with pytest.raises(ContractError, match=f"^dataset: {message}"):
        check_dataset(factory)


def test_bytes_are_inputs_too() -> None:
    check_dataset(lambda root, seed, subset: retyped(points(seed, subset), torch.uint8, torch.int64))
