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


def _timm_backbone(input_shape: tuple[int, ...], **options: Any) -> nn.Module:
    """A backbone of timm, which only those who use one wait for."""
    from fishr.models.backbone import Backbone

    return Backbone(input_shape, **options)


FEATURIZERS.register("timm", _timm_backbone)


DEFAULT_BACKBONE = "resnet50.tv_in1k"
"""The published protocol's: Gulrajani and Lopez-Paz, arXiv 2007.01434."""


@dataclass(frozen=True)
class ModelConfig:
    """Which network.

    Attributes:
        featurizer: A name in :data:`FEATURIZERS`.
        options: Its keyword arguments.
        init: ``"default"``: PyTorch's; ``"xavier"``: Xavier-uniform weights and zero biases in all linear layers (the
            Colored MNIST protocol).
        weights: The featurizer's initial weights where they are not drawn: ``"hub:<id>"``, of timm's on the Hugging
            Face hub, or ``"sha256:<digest>"``, of a file. :func:`build_model` does not look at it: they are loaded by
            :func:`fishr.models.backbone.load_initial_weights`, at the start of a training and never for a saved model.
    """

    featurizer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    init: Literal["default", "xavier"] = "default"
    weights: str | None = None


def default_model(kind: Kind, input_shape: tuple[int, ...]) -> ModelConfig:
    """The customary network for a kind of data; for images ResNet-50 with torchvision's first ImageNet weights."""
    if kind == "images":
        from fishr.models.backbone import backbone_config

        return backbone_config(DEFAULT_BACKBONE, channels=input_shape[0])
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
