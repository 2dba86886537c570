"""Featurizers that see the batch: what they return for one sample depends on the others.

A batch is taken to come from one domain. A sample alone is a domain of its own.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fishr.errors import ConfigError
from fishr.models.build import FEATURIZERS

CONTEXT_WIDTH = 64


class BatchDependent(nn.Module):
    """A featurizer around another one, whose features depend on the whole batch.

    Attributes:
        inner: The featurizer inside, which sees each sample alone.
        num_features: Width of the features.
    """

    inner: nn.Module
    num_features: int


def evaluation_order(featurizer: nn.Module, num_samples: int) -> Tensor:
    """The order in which samples of one domain are evaluated, indices int64 ``[sample]``.

    It is random, and always the same, where the featurizer sees the batch: data often lie class by class, and a batch
    of one class says little about its domain.
    """
    if isinstance(featurizer, BatchDependent):
        return torch.randperm(num_samples, generator=torch.Generator().manual_seed(0))
    return torch.arange(num_samples)


class MeanEmbedding(BatchDependent):
    """The features of a featurizer, joined by their mean over the batch.

    Args:
        input_shape: Shape of one input.
        featurizer: Name of the featurizer inside.
        options: Its keyword arguments.
    """

    def __init__(self, input_shape: tuple[int, ...], featurizer: str, options: Mapping[str, Any] = {}) -> None:
        super().__init__()
        self.inner = _inner(input_shape, featurizer, options)
        self.num_features = 2 * self.inner.num_features  # type: ignore[operator,assignment]

    def forward(self, inputs: Tensor) -> Tensor:
        """Features ``[sample, feature]``: half of them of the sample, half of the batch."""
        features: Tensor = self.inner(inputs)
        return self.join(features, features.mean(0))

    @staticmethod
    def join(features: Tensor, embedding: Tensor) -> Tensor:
        """Features ``[sample, feature]`` and the embedding ``[feature]`` of their domain."""
        return torch.cat([features, embedding.expand_as(features)], dim=1)


class ContextFeaturizer(BatchDependent):
    """A featurizer whose input is joined by a context: the output of a small network, averaged over the batch.

    For images ``(channels, height, width)`` the context is one more channel, made by three 5×5 convolutions with 64, 64
    and 1 channels; for vectors it is as many inputs more, made by three linear layers. Batch norm and ReLU lie between.

    Args:
        input_shape: Shape of one input.
        featurizer: Name of the featurizer inside.
        options: Its keyword arguments, for inputs without context.
    """

    def __init__(self, input_shape: tuple[int, ...], featurizer: str, options: Mapping[str, Any] = {}) -> None:
        super().__init__()
        self.context: nn.Module
        if len(input_shape) == 3:
            channels, *size = input_shape
            self.context = nn.Sequential(
                nn.Conv2d(channels, CONTEXT_WIDTH, 5, padding=2),
                nn.BatchNorm2d(CONTEXT_WIDTH),
                nn.ReLU(),
                nn.Conv2d(CONTEXT_WIDTH, CONTEXT_WIDTH, 5, padding=2),
                nn.BatchNorm2d(CONTEXT_WIDTH),
                nn.ReLU(),
                nn.Conv2d(CONTEXT_WIDTH, 1, 5, padding=2),
            )
            joined_shape: tuple[int, ...] = (channels + 1, *size)
        else:
            width = math.prod(input_shape)
            self.context = nn.Sequential(
                nn.Flatten(),
                nn.Linear(width, CONTEXT_WIDTH),
                nn.BatchNorm1d(CONTEXT_WIDTH),
                nn.ReLU(),
                nn.Linear(CONTEXT_WIDTH, CONTEXT_WIDTH),
                nn.BatchNorm1d(CONTEXT_WIDTH),
                nn.ReLU(),
                nn.Linear(CONTEXT_WIDTH, width),
                nn.Unflatten(1, input_shape),
            )
            joined_shape = (2 * input_shape[0], *input_shape[1:])
        # A backbone normalises its input channel by channel; the context is taken as it is.
        unchanged = {name: [*options[name], value] for name, value in (("mean", 0.0), ("std", 1.0)) if name in options}
        self.inner = _inner(joined_shape, featurizer, {**options, **unchanged})
        self.num_features = self.inner.num_features  # type: ignore[assignment]

    def forward(self, inputs: Tensor) -> Tensor:
        """Features ``[sample, feature]`` of samples of one domain."""
        context = self.context(inputs).mean(0)
        features: Tensor = self.inner(torch.cat([inputs, context.expand(len(inputs), *context.shape)], dim=1))
        return features


def _inner(input_shape: tuple[int, ...], featurizer: str, options: Mapping[str, Any]) -> nn.Module:
    inner = FEATURIZERS[featurizer](input_shape, **options)
    if isinstance(inner, BatchDependent):
        raise ConfigError(f"the featurizer inside must see each sample alone, got {featurizer!r}")
    return inner


FEATURIZERS.register("mean-embedding", MeanEmbedding)
FEATURIZERS.register("context", ContextFeaturizer)
