"""Data from several domains: the dataset and the batch."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fishr.data.cache import Progress
from fishr.data.color_jitter import ColorChanges
from fishr.data.image_format import ImageFormat
from fishr.data.images import Images
from fishr.errors import DataError
from fishr.functional.distributed import share_lengths
from fishr.registry import unknown

logger = logging.getLogger(__name__)

Kind = Literal["vectors", "small_images", "images"]
"""What the inputs are; hyperparameter defaults and search spaces depend on it."""


class Samples(NamedTuple):
    """Inputs ``[sample, ...]``, held in memory or read when needed, and targets ``[sample]`` of one domain."""

    inputs: Tensor | Images
    targets: Tensor

    def subset(self, indices: Tensor) -> "Samples":
        """Some of the samples."""
        inputs = self.inputs.subset(indices) if isinstance(self.inputs, Images) else self.inputs[indices]
        return Samples(inputs, self.targets[indices])


def network_input(inputs: Tensor, device: torch.device) -> Tensor:
    """Inputs on the device; uint8 images become float32 in [0, 1]."""
    inputs = inputs.to(device, non_blocking=True)
    return inputs.float().div_(255) if inputs.dtype == torch.uint8 else inputs


@dataclass(frozen=True)
class DomainBatch:
    """A batch from several domains: samples of domain 0 first, then of domain 1, ...

    With several ranks, in a data-parallel run, each knows the targets of the whole batch and has inputs of its own: of
    each domain its :func:`fishr.functional.distributed.share`.

    Attributes:
        inputs: ``[sample, ...]``, those of this rank.
        targets: ``[sample]``.
        sizes: Samples of each domain, in order.
        rank: Whose inputs they are.
        num_ranks: How many have a share.
        colors: What is left to be done to the colors of the inputs, uint8 images, on their way to a device.
    """

    inputs: Tensor
    targets: Tensor
    sizes: tuple[int, ...]
    rank: int = 0
    num_ranks: int = 1
    colors: ColorChanges | None = None

    @classmethod
    def of(cls, inputs: list[Tensor], targets: list[Tensor]) -> "DomainBatch":
        """Lay the samples of several domains one after the other."""
        return cls(torch.cat(inputs), torch.cat(targets), tuple(map(len, targets)))

    @property
    def domains(self) -> Tensor:
        """The domain of each sample, int64 ``[sample]``."""
        # Filled on the device: copying a host tensor there would make the host wait.
        parts = [self.targets.new_full((size,), domain, dtype=torch.int64) for domain, size in enumerate(self.sizes)]
        return torch.cat(parts)

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """Values of samples, ``[sample, ...]``, domain by domain."""
        return torch.split(values, list(self.sizes))

    @property
    def parts(self) -> tuple["DomainBatch", ...]:
        """The batch of each domain alone."""
        inputs = torch.split(self.inputs, share_lengths(self.sizes, self.rank, self.num_ranks))
        return tuple(
            replace(self, inputs=own, targets=targets, sizes=(size,))
            for own, targets, size in zip(inputs, self.split(self.targets), self.sizes, strict=True)
        )

    def to(self, device: torch.device) -> "DomainBatch":
        """The batch on a device, its inputs as a network takes them; the host does not wait for the copies."""
        if self.colors is None:
            inputs = network_input(self.inputs, device)
        else:
            inputs = self.colors.to(device).applied(self.inputs.to(device, non_blocking=True)).div_(255)
        return replace(self, inputs=inputs, targets=self.targets.to(device, non_blocking=True), colors=None)

    def pin_memory(self) -> "DomainBatch":
        """The batch in memory from which a GPU copies while the host goes on."""
        colors = None if self.colors is None else self.colors.pin_memory()
        return replace(self, inputs=self.inputs.pin_memory(), targets=self.targets.pin_memory(), colors=colors)


@dataclass(frozen=True)
class MultiDomainDataset:
    """Labelled samples from several named domains.

    Attributes:
        name: The name it is known by.
        kind: What the inputs are.
        domains: Name of each domain to its samples, in the customary order; inputs float32, or :class:`Images`, of the
            same shape in all domains, targets int64.
        classes: Name of each class.
        test_domain: The domain customarily held out, if there is one.
        binary: Whether two classes are told apart by a single logit.
        evaluation_only: Domains that are never trained on, such as the test images under another coloring.
        options: What it was loaded with; a run's config names the data by name and options.
        fixed_out: For domains whose split was made by the data's owner: whether a sample lies in the out-split, bool
            ``[sample]``.
        groups: For domains with samples that belong together, such as those of a patient: the group of each, int64
            ``[sample]``, with the same meaning in all domains. A group never lies on both sides of a split.
        flattened: ``(channels, rows, columns)`` of the images whose pixels, in [0, 1], the inputs are; None where they
            are something else.
        published: Whether it is a benchmark with published hyperparameters, which are the defaults on it then.

    Raises:
        DataError: no domain, a test domain that cannot be one, an empty domain, inputs and targets of different
            lengths, targets that are no class, or inputs of different shapes.
    """

    name: str
    kind: Kind
    domains: Mapping[str, Samples]
    classes: tuple[str, ...]
    test_domain: str | None = None
    binary: bool = False
    evaluation_only: frozenset[str] = field(default_factory=frozenset)
    options: Mapping[str, Any] = field(default_factory=dict)
    fixed_out: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    groups: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    flattened: tuple[int, int, int] | None = None
    published: bool = False

    def __post_init__(self) -> None:
        if not self.domains:
            raise DataError(f"dataset {self.name!r} has no domain")
        if self.test_domain is not None and self.test_domain not in self.trainable_domains:
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

        for kind, columns in (("fixed_out", self.fixed_out), ("groups", self.groups)):
            for domain, column in columns.items():
                if domain not in self.domains or len(column) != len(self.domains[domain].targets):
                    raise DataError(
                        f"{kind} of {self.name!r} has {len(column)} entries for domain {domain!r}, expected one for "
                        "each of its samples"
                    )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(next(iter(self.domains.values())).inputs.shape[1:])

    @property
    def image_format(self) -> ImageFormat | None:
        """What images are brought to, or None if the inputs are no images to be read."""
        inputs = next(iter(self.domains.values())).inputs
        return inputs.format if isinstance(inputs, Images) else None

    @property
    def num_outputs(self) -> int:
        """Logits that a head for this dataset has."""
        return 1 if self.binary else len(self.classes)

    @property
    def trainable_domains(self) -> tuple[str, ...]:
        """Domains that may be trained on or held out."""
        return tuple(domain for domain in self.domains if domain not in self.evaluation_only)

    def open(self, progress: Progress | None = None) -> None:
        """Decode images that are not in the cache; without images there is nothing to do.

        Raises:
            DataError: images that cannot be read, or a cache that cannot be written.
        """
        for samples in self.domains.values():
            if isinstance(samples.inputs, Images):
                samples.inputs.files.open(progress)

    def check_test_domains(self, names: tuple[str, ...]) -> None:
        """Check that the data can be trained on with these domains held out.

        Raises:
            ConfigError: a name that is no domain to hold out.
            DataError: no domain would be left to train on, or there is but one class.
        """
        if len(self.classes) < 2:
            raise DataError(
                f"dataset {self.name!r} has images of one class, {self.classes[0]!r}: at least 2 are needed to tell "
                "apart"
            )
        if len(self.trainable_domains) < 2:
            raise DataError(
                f"dataset {self.name!r} has {len(self.trainable_domains)} domain to train on or hold out "
                f"({', '.join(self.trainable_domains) or 'all are for evaluation only'}); at least 2 are needed: data "
                "from two or more places, cameras or customers"
            )
        for name in names:
            if name not in self.trainable_domains:
                raise unknown(f"test domain of {self.name!r}", name, self.trainable_domains)
        if len(self.trainable_domains) - len(set(names)) < 1:
            raise DataError(f"holding out {', '.join(names)} leaves no domain of {self.name!r} to train on")
        held_out = {group for name in names if name in self.groups for group in self.groups[name].tolist()}
        train_domains = [name for name in self.trainable_domains if name not in names]
        trained_on = {g for name in train_domains if name in self.groups for g in self.groups[name].tolist()}
        if shared := len(held_out & trained_on):
            logger.warning(
                "%d groups of %r have samples both in the held-out domain and in training domains: "
                "accuracy there is not that on unseen groups",
                shared,
                self.name,
            )
