"""Data from several domains: the dataset and the batch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fishr.errors import DataError
from fishr.registry import unknown

Kind = Literal["vectors", "small_images", "images"]
"""What the inputs are; hyperparameter defaults and search spaces depend on it."""


class Samples(NamedTuple):
    """Inputs ``[sample, ...]`` and targets ``[sample]`` of one domain."""

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class DomainBatch:
    """A batch from several domains: samples of domain 0 first, then of domain 1, ...

    Attributes:
        inputs: ``[sample, ...]``.
        targets: ``[sample]``.
        sizes: Samples of each domain, in order.
    """

    inputs: Tensor
    targets: Tensor
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, parts: list[Samples]) -> "DomainBatch":
        """Lay the samples of several domains one after the other."""
        return cls(
            torch.cat([part.inputs for part in parts]),
            torch.cat([part.targets for part in parts]),
            tuple(len(part.targets) for part in parts),
        )

    @property
    def domains(self) -> Tensor:
        """The domain of each sample, int64 ``[sample]``."""
        return torch.repeat_interleave(torch.tensor(self.sizes)).to(self.inputs.device)

    def to(self, device: torch.device) -> "DomainBatch":
        return DomainBatch(self.inputs.to(device), self.targets.to(device), self.sizes)


@dataclass(frozen=True)
class MultiDomainDataset:
    """Labelled samples from several named domains, held in memory.

    Attributes:
        name: The name it is known by.
        kind: What the inputs are.
        domains: Name of each domain to its samples, in the customary order; inputs float32 without the sample
            dimension's size differing between domains, targets int64.
        classes: Name of each class.
        test_domain: The domain customarily held out.
        binary: Whether two classes are told apart by a single logit.
        evaluation_only: Domains that are never trained on, such as the test images under another coloring.
        options: What it was loaded with; a run's config names the data by name and options.

    Raises:
        DataError: fewer than two domains to train on and hold out, a test domain that is not one of them,
            an empty domain, inputs and targets of different lengths, targets that are no class, or inputs of
            different shapes.
    """

    name: str
    kind: Kind
    domains: Mapping[str, Samples]
    classes: tuple[str, ...]
    test_domain: str
    binary: bool = False
    evaluation_only: frozenset[str] = field(default_factory=frozenset)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.trainable_domains) < 2:
            raise DataError(
                f"dataset {self.name!r} has {len(self.trainable_domains)} domain to train on or hold out "
                f"({', '.join(self.trainable_domains)}); at least 2 are needed"
            )
        if self.test_domain not in self.trainable_domains:
            raise DataError(
                f"the test domain of {self.name!r} must be one of {', '.join(self.trainable_domains)}, "
                f"got {self.test_domain!r}"
            )
        for domain, (inputs, targets) in self.domains.items():
            if len(inputs) != len(targets) or len(targets) == 0:
                raise DataError(
                    f"domain {domain!r} of {self.name!r} has {len(inputs)} inputs and {len(targets)} targets"
                )
            if targets.min() < 0 or targets.max() >= len(self.classes):
                raise DataError(
                    f"targets of domain {domain!r} of {self.name!r} run from {targets.min()} to {targets.max()}; "
                    f"its {len(self.classes)} classes are 0 to {len(self.classes) - 1}"
                )
            if tuple(inputs.shape[1:]) != self.input_shape:
                raise DataError(
                    f"inputs of domain {domain!r} of {self.name!r} have shape {list(inputs.shape[1:])}, "
                    f"expected {list(self.input_shape)} as in the first domain"
                )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(next(iter(self.domains.values())).inputs.shape[1:])

    @property
    def num_outputs(self) -> int:
        """Logits that a head for this dataset has."""
        return 1 if self.binary else len(self.classes)

    @property
    def trainable_domains(self) -> tuple[str, ...]:
        """Domains that may be trained on or held out."""
        return tuple(domain for domain in self.domains if domain not in self.evaluation_only)

    def check_test_domains(self, names: tuple[str, ...]) -> None:
        """Raises ConfigError for a name that is no domain to hold out, DataError if none would be left to train on."""
        for name in names:
            if name not in self.trainable_domains:
                raise unknown(f"test domain of {self.name!r}", name, self.trainable_domains)
        if len(self.trainable_domains) - len(set(names)) < 1:
            raise DataError(f"holding out {', '.join(names)} leaves no domain of {self.name!r} to train on")
