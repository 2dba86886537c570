"""What every algorithm is: a featurizer, a linear head, a frozen config, and the losses of a step."""

import math
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from fishr.algorithms.adam import FusedAdam
from fishr.data.base import DomainBatch, Kind
from fishr.errors import ConfigError
from fishr.functional.distributed import gather_shares, mean_over_ranks, own_random_numbers
from fishr.functional.residuals import Loss, per_sample_losses
from fishr.models.build import ModelConfig
from fishr.registry import unknown
from fishr.space import Choice, Distribution, LogUniform

NOTATION = (
    "In the formulas: n samples of the batch, |E| training domains e, ℓ_i the loss of sample i and h_i its "  # noqa: RUF001
    "features, R_e the mean loss of the samples of domain e in the batch. The L2 term is added to what trains "
    "featurizer and head."
)
"""What the docstrings of all algorithms take as known."""


@dataclass(frozen=True)
class AlgorithmConfig:
    """Hyperparameters that every algorithm has.

    Attributes:
        lr: Learning rate of Adam.
        weight_decay: L2 term in Adam's gradient.
        batch_size: Samples of each domain in a batch; null for all of them at every step.
        l2: Weight of Σ‖w‖² over all weights and biases, added to the loss (the Colored MNIST protocol).
        dropout: Probability that a feature is dropped before the head in training.

    Raises:
        ConfigError: a value of the wrong type or out of range; all such problems in one message.
    """

    lr: float = 1e-3
    weight_decay: float = 0.0
    batch_size: int | None = 64
    l2: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        problems = [
            f"{name} must be {_describe(hint)}, got {getattr(self, name)!r}"
            for name, hint in hints.items()
            if not _fits(getattr(self, name), hint)
        ]
        if problems := problems or self.problems():
            raise ConfigError("; ".join(problems))
        for name, hint in hints.items():
            # 1 and 1.0 are one setting, unless the type tells them apart (a step or a share).
            value = getattr(self, name)
            if type(value) is int and not _fits_whole(hint):
                object.__setattr__(self, name, float(value))

    @classmethod
    def default(cls, kind: Kind) -> Self:
        """The published defaults for a kind of data."""
        return cls(lr=5e-5, batch_size=32) if kind == "images" else cls()

    @classmethod
    def recommended(cls, kind: Kind) -> Self:
        """What to begin with on data of one's own: the published defaults, but for what is not portable in them."""
        return cls.default(kind)

    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        """The published search space for a kind of data (Gulrajani and Lopez-Paz, arXiv 2007.01434)."""
        if kind == "images":
            return {
                "lr": LogUniform(1e-5, 10**-3.5),
                "weight_decay": LogUniform(1e-6, 1e-2),
                "batch_size": LogUniform(2**3, 2**5.5, integer=True),
                "dropout": Choice((0.0, 0.1, 0.5)),
            }
        return {
            "lr": LogUniform(10**-4.5, 10**-2.5),
            "weight_decay": Choice((0.0,)),
            "batch_size": LogUniform(2**3, 2**9, integer=True),
        }

    def updated(self, changes: Mapping[str, Any]) -> Self:
        """A copy with some hyperparameters changed.

        Raises:
            ConfigError: a name that is not a hyperparameter, or a value that it cannot take.
        """
        names = [item.name for item in fields(self)]
        for name in changes:
            if name not in names:
                raise unknown("hyperparameter", name, names)
        return replace(self, **changes)

    def with_given(self, changes: Mapping[str, Any]) -> Self:
        """As :meth:`updated`, where a ``penalty_weight`` takes the place of a ``strength`` that nobody gave."""
        if "penalty_weight" in changes and hasattr(self, "strength"):
            changes = {"strength": None, **changes}
        return self.updated(changes)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def least_batch_size(self) -> int:
        """Samples of each domain that a batch must have."""
        return 1

    def problems(self) -> list[str]:
        """What is wrong with values of the right types, one phrase each; subclasses add to it."""
        problems = []
        if self.lr <= 0:
            problems.append(f"lr must be above 0, got {self.lr}")
        if self.batch_size is not None and self.batch_size < self.least_batch_size():
            problems.append(
                f"batch_size must be at least {self.least_batch_size()}, or null for all samples, got {self.batch_size}"
            )
        problems += [
            f"{name} must be at least 0, got {getattr(self, name)}"
            for name in ("weight_decay", "l2")
            if getattr(self, name) < 0
        ]
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout must lie in [0, 1), got {self.dropout}")
        return problems


def _fits(value: object, hint: object) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)  # type: ignore[arg-type]


def _fits_whole(hint: object) -> bool:
    return hint is int or int in get_args(hint)


def _describe(hint: object) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    names: dict[object, str] = {float: "a number", int: "a whole number", bool: "true or false", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


@dataclass(frozen=True)
class Reference:
    """Where an algorithm was published.

    >>> str(Reference("Sun, Saenko", "Deep CORAL", 2016, venue="ECCV Workshops", arxiv="1607.01719"))
    'Sun, Saenko: Deep CORAL, ECCV Workshops 2016, arXiv 1607.01719'
    """

    authors: str
    title: str
    year: int
    venue: str | None = None
    arxiv: str | None = None

    def __str__(self) -> str:
        appeared = f"{self.venue} {self.year}" if self.venue else str(self.year)
        return f"{self.authors}: {self.title}, {appeared}" + (f", arXiv {self.arxiv}" if self.arxiv else "")


@dataclass(frozen=True)
class Losses:
    """The scalar to minimise and the terms it is made of, for the record."""

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)

    def detached(self) -> "Losses":
        """The values alone, without the graphs that keep a step's activations alive."""
        return Losses(self.total.detach(), {name: value.detach() for name, value in self.terms.items()})


class Algorithm(nn.Module):
    """A way to train a featurizer and a linear head on several domains.

    Most algorithms define only :meth:`losses`. Those with more optimizers override
    :meth:`configure_optimizers`; those that need more than one backward pass override :meth:`training_step`.

    Args:
        featurizer: Inputs to features ``[sample, feature]``.
        classifier: The linear head, features to logits ``[sample, class]``.
        num_domains: Number of training domains.
        config: Hyperparameters; default ``Config()``.
        loss: As :class:`fishr.nn.FishrPenalty` takes it. Default: cross-entropy, for a single logit binary
            cross-entropy.
        steps: Length of the run, needed by schedules that are shares of it.

    Attributes:
        title: Its customary name; default: the name of the class.
        reference: Where it was published.
        min_domains: Training domains that it needs.
        for_classes: Whether it presupposes classes, so that it trains no regressor.
        for_ranks: Whether it trains on several devices at once: all that its losses take of a batch, besides targets,
            are :meth:`features`.
        compiles: Whether its featurizer may be compiled: it takes one gradient through each of its passes.
        autocast: Makes the context that the featurizer runs in; the training loop sets it to the run's precision.
        switch_on_step: The first step at which the objective is the algorithm's own; before, it is ERM's.
        ramp: Steps from then on until it is so in full.
    """

    Config: ClassVar[type[AlgorithmConfig]] = AlgorithmConfig
    title: ClassVar[str] = ""
    reference: ClassVar[Reference]
    min_domains: ClassVar[int] = 1
    for_classes: ClassVar[bool] = False
    for_ranks: ClassVar[bool] = True
    compiles: bool = True
    switch_on_step: int = 0
    ramp: int = 0

    def __init__(
        self,
        featurizer: nn.Module,
        classifier: nn.Linear,
        num_domains: int,
        config: AlgorithmConfig | None = None,
        *,
        loss: Loss | None = None,
        steps: int | None = None,
    ) -> None:
        super().__init__()
        config = self.Config() if config is None else config
        if not isinstance(config, self.Config):
            raise ConfigError(f"{type(self).__name__} takes a {self.Config.__name__}, got a {type(config).__name__}")
        if num_domains < self.min_domains:
            raise ConfigError(
                f"{type(self).__name__} compares domains and needs at least {self.min_domains} to train on, got "
                f"{num_domains}: hold out fewer, or take another algorithm, such as erm"
            )
        self.featurizer, self.classifier = featurizer, classifier
        self.num_domains, self.config, self.steps = num_domains, config, steps
        if loss is None:
            loss = nn.BCEWithLogitsLoss() if classifier.out_features == 1 else nn.CrossEntropyLoss()
        self.loss = loss
        self.autocast: Callable[[], AbstractContextManager[object]] = nullcontext
        self.setup()

    @classmethod
    def model_config(cls, model: ModelConfig) -> ModelConfig:
        """The network that the algorithm trains where ``model`` is asked for."""
        return model

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.title = cls.title or cls.__name__

    def setup(self) -> None:
        """Make modules and state of the algorithm's own; the last thing that construction does."""

    def configure_optimizers(self) -> dict[str, Optimizer]:
        """Named optimizers; all of them are checkpointed."""
        return {"main": FusedAdam(self.parameters(), self.config.lr, weight_decay=self.config.weight_decay)}

    def losses(self, batch: DomainBatch, step: int) -> Losses:
        """The losses of one step (an index that starts at 0)."""
        raise NotImplementedError

    def training_step(self, batch: DomainBatch, step: int, optimizers: Mapping[str, Optimizer]) -> Losses:
        """One update of the weights; returns the losses before it."""
        losses = self.losses(batch, step)
        optimizer = optimizers["main"]
        optimizer.zero_grad()
        losses.total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return losses

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``[sample, class]`` of any inputs; those of a batch to train on are those of its :meth:`features`."""
        return self.logits(self.dropped(self._featurized(inputs)))

    def features(self, batch: DomainBatch) -> Tensor:
        """What the featurizer returns, ``[sample, feature]``, in the precision of the run, after dropout.

        With several ranks each has inputs of its own, and the features of all are gathered: what is computed from them
        is the same on each rank, and the same as in one process.
        """
        if batch.num_ranks == 1:
            return self.dropped(self._featurized(batch.inputs))
        with own_random_numbers(batch.inputs.device):
            own = self._featurized(batch.inputs)
        return self.dropped(gather_shares(own, batch.sizes))

    def _featurized(self, inputs: Tensor) -> Tensor:
        with self.autocast():
            features: Tensor = self.featurizer(inputs)
        return features

    def dropped(self, features: Tensor) -> Tensor:
        """Features after dropout."""
        return F.dropout(features, self.config.dropout, self.training) if self.config.dropout > 0 else features

    def logits(self, features: Tensor) -> Tensor:
        """The head, in its own precision: half-precision logits would give rounded residuals."""
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.classifier(features.to(self.classifier.weight.dtype))
        return logits

    def sample_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """ℓ_i of every sample, ``[sample]``."""
        return per_sample_losses(self.loss, logits, targets)

    def domain_risks(self, logits: Tensor, batch: DomainBatch) -> Tensor:
        """R_e, the mean loss of each domain, ``[domain]``."""
        return domain_means(self.sample_losses(logits, batch.targets), batch)

    @property
    def network_parameters(self) -> list[nn.Parameter]:
        """Weights of featurizer and head that are trained."""
        weights = [*self.featurizer.parameters(), *self.classifier.parameters()]
        return [weight for weight in weights if weight.requires_grad]

    def l2_term(self) -> Tensor | float:
        """``l2`` · Σ‖w‖² over all weights and biases of featurizer and head."""
        if self.config.l2 == 0:
            return 0.0
        weights = [*self.featurizer.parameters(), *self.classifier.parameters()]
        return self.config.l2 * torch.stack([of_layer.square().sum() for of_layer in weights]).sum()


def domain_means(values: Tensor, batch: DomainBatch) -> Tensor:
    """Mean over the samples of each domain: ``[sample, ...]`` to ``[domain, ...]``."""
    return torch.stack([part.mean(0) for part in batch.split(values)])


def gradients(
    objective: Tensor, weights: Sequence[Tensor], batch: DomainBatch, *, create_graph: bool = False
) -> list[Tensor]:
    """Gradient of a function of the batch's features by weights, the same on all ranks; its graph stays."""
    found = torch.autograd.grad(
        objective, weights, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )
    return [mean_over_ranks(gradient) for gradient in found] if batch.num_ranks > 1 else list(found)


def domain_gradients(
    objectives: Tensor, weights: Sequence[Tensor], batch: DomainBatch, *, create_graph: bool = False
) -> list[Tensor]:
    """Gradient of each domain's objective ``[domain]``: of each weight tensor ``[domain, ...its shape]``."""
    of_domains = [gradients(objective, weights, batch, create_graph=create_graph) for objective in objectives]
    return [torch.stack(of_weight) for of_weight in zip(*of_domains, strict=True)]
