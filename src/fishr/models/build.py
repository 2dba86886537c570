"""A network from its config."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from fishr.data.base import Kind
from fishr.errors import ConfigError
from fishr.models.mlp import MLP
from fishr.models.mnist_cnn import MNISTCNN
from fishr.registry import Registry

FEATURIZERS: Registry[Callable[..., nn.Module]] = Registry("featurizer")
"""Callables ``(input_shape, **options) -> module`` whose module has an int ``num_features``."""
FEATURIZERS.register("mlp", MLP)
FEATURIZERS.register("mnist-cnn", MNISTCNN)


@dataclass(frozen=True)
class ModelConfig:
    """Which network.

    Attributes:
        featurizer: A name in :data:`FEATURIZERS`.
        options: Its keyword arguments.
        init: ``"default"``: PyTorch's; ``"xavier"``: Xavier-uniform weights and zero biases in all linear layers (the
            Colored MNIST protocol).
    """

    featurizer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    init: Literal["default", "xavier"] = "default"


def default_model(kind: Kind) -> ModelConfig:
    """The customary network for a kind of data."""
    return ModelConfig("mnist-cnn" if kind == "small_images" else "mlp")


def build_model(config: ModelConfig, input_shape: tuple[int, ...], num_outputs: int) -> tuple[nn.Module, nn.Linear]:
    """Featurizer and linear head, initialised from torch's random state.

    Raises:
        ConfigError: an unknown featurizer or init, or options that the featurizer does not take.
    """
    build = FEATURIZERS[config.featurizer]
    try:
        featurizer = build(input_shape, **config.options)
    except TypeError as error:
        raise ConfigError(f"featurizer {config.featurizer!r} cannot be built: {error}") from None
    classifier = nn.Linear(featurizer.num_features, num_outputs)  # type: ignore[arg-type]
    if config.init == "xavier":
        for module in nn.ModuleList([featurizer, classifier]).modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
    elif config.init != "default":
        raise ConfigError(f"init must be 'default' or 'xavier', got {config.init!r}")
    return featurizer, classifier
