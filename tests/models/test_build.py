import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fishr.errors import ConfigError
from fishr.models import FEATURIZERS, ModelConfig, build_model, default_model
from fishr.models.backbone import backbone_config
from fishr.models.mlp import MLP
from fishr.models.mnist_cnn import MNISTCNN


def shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in module.parameters()]


# MLP


def test_mlp_layer_by_layer() -> None:
    """The network of the Colored MNIST protocol, 392-390-390-1."""
    featurizer, classifier = build_model(ModelConfig("mlp", {"width": 390, "depth": 2}), (392,), 1)
    layers = [type(layer).__name__ for layer in featurizer]
    assert layers == ["Flatten", "Linear", "ReLU", "Linear", "ReLU"]
    assert shapes(featurizer) == [(390, 392), (390,), (390, 390), (390,)]
    assert shapes(classifier) == [(1, 390), (1,)]


def test_mlp_is_what_it_says() -> None:
    mlp = MLP((2, 3), width=4, depth=2)
    inputs = torch.randn(5, 2, 3)
    first, second = mlp[1], mlp[3]
    hidden = (inputs.reshape(5, 6) @ first.weight.T + first.bias).clamp(min=0)
    expected = (hidden @ second.weight.T + second.bias).clamp(min=0)
    assert torch.allclose(mlp(inputs), expected, atol=1e-6)
    assert (expected == 0).any()


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("width", [1, 7])
def test_mlp_of_any_size(depth: int, width: int) -> None:
    mlp = MLP((3,), width=width, depth=depth)
    assert mlp(torch.randn(2, 3)).shape == (2, width)
    assert mlp.num_features == width
    assert sum(isinstance(layer, nn.Linear) for layer in mlp) == depth


@pytest.mark.parametrize(("width", "depth"), [(0, 2), (3, 0), (-1, -1)])
def test_an_mlp_without_layers_is_refused(width: int, depth: int) -> None:
    with pytest.raises(ConfigError, match=rf"an MLP needs a width and a depth of at least 1, got {width} and {depth}$"):
        MLP((3,), width=width, depth=depth)


# MNIST CNN


def test_mnist_cnn_layer_by_layer() -> None:
    cnn = MNISTCNN((2, 28, 28))
    kinds = [type(layer).__name__ for layer in cnn]
    assert kinds == ["Conv2d", "ReLU", "GroupNorm"] * 4 + ["AdaptiveAvgPool2d", "Flatten"]
    convolutions = [layer for layer in cnn if isinstance(layer, nn.Conv2d)]
    assert [(layer.in_channels, layer.out_channels) for layer in convolutions] == [
        (2, 64), (64, 128), (128, 128), (128, 128),
    ]  # fmt: skip
    assert [layer.stride for layer in convolutions] == [(1, 1), (2, 2), (1, 1), (1, 1)]
    assert {layer.kernel_size for layer in convolutions} == {(3, 3)}
    assert {layer.padding for layer in convolutions} == {(1, 1)}
    norms = [layer for layer in cnn if isinstance(layer, nn.GroupNorm)]
    assert [(layer.num_groups, layer.num_channels) for layer in norms] == [(8, 64), (8, 128), (8, 128), (8, 128)]
    assert cnn.num_features == 128


def test_mnist_cnn_is_what_it_says() -> None:
    """Convolution, ReLU, then normalization, four times; the mean over space."""
    cnn = MNISTCNN((1, 8, 8))
    images = torch.randn(3, 1, 8, 8)
    values = images
    for index, stride in ((0, 1), (3, 2), (6, 1), (9, 1)):
        values = F.conv2d(values, cnn[index].weight, cnn[index].bias, stride=stride, padding=1).relu()
        groups = values.reshape(3, 8, -1)
        variance, mean = torch.var_mean(groups, 2, correction=0, keepdim=True)
        values = ((groups - mean) / (variance + 1e-5).sqrt()).reshape(values.shape)
    assert torch.allclose(cnn(images), values.mean((2, 3)), atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 28, 28), (3, 9, 15), (1, 1, 1)])
def test_mnist_cnn_takes_any_image(shape: tuple[int, ...]) -> None:
    assert MNISTCNN(shape)(torch.randn(2, *shape)).shape == (2, 128)


@pytest.mark.parametrize("shape", [(392,), (28, 28), (1, 1, 28, 28)])
def test_mnist_cnn_takes_nothing_but_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"mnist-cnn takes images \(channels, height, width\), got inputs of shape"):
        build_model(ModelConfig("mnist-cnn"), shape, 2)


# Building


def test_networks_by_name() -> None:
    assert set(FEATURIZERS) >= {"mlp", "mnist-cnn", "timm"}
    for kind, expected in (("vectors", "mlp"), ("small_images", "mnist-cnn")):
        assert default_model(kind, (3, 28, 28)) == ModelConfig(expected)
    assert default_model("images", (1, 224, 224)) == backbone_config("resnet50.tv_in1k", channels=1)


def test_backbones_are_waited_for_by_those_who_use_one() -> None:
    script = "import sys, fishr.models, fishr.models.backbone; assert 'timm' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_building_does_not_look_at_the_weights() -> None:
    config = ModelConfig("mlp", weights="hub:nobody/nothing")
    torch.manual_seed(0)
    featurizer, _ = build_model(config, (3,), 2)
    torch.manual_seed(0)
    expected, _ = build_model(ModelConfig("mlp"), (3,), 2)
    assert torch.equal(featurizer[1].weight, expected[1].weight)


@pytest.mark.parametrize("init", ["default", "xavier"])
def test_built_from_torchs_random_state(init: str) -> None:
    def built(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        parts = build_model(ModelConfig("mlp", {"width": 5}, init), (3,), 2)
        return [parameter for part in parts for parameter in part.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(built(0), built(0), strict=True))
    assert not torch.equal(built(0)[0], built(1)[0])


def test_xavier_fills_its_bounds_and_biases_are_zero() -> None:
    torch.manual_seed(0)
    featurizer, classifier = build_model(ModelConfig("mlp", {"width": 200, "depth": 2}, "xavier"), (100,), 50)
    for layer in (featurizer[1], featurizer[3], classifier):
        outputs, inputs = layer.weight.shape
        bound = math.sqrt(6 / (inputs + outputs))
        assert layer.weight.abs().max() <= bound
        assert layer.weight.abs().max() > 0.99 * bound
        # A uniform distribution has the standard deviation bound/√3.
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert torch.equal(layer.bias, torch.zeros(outputs))


def test_the_default_init_is_pytorchs() -> None:
    torch.manual_seed(0)
    featurizer, classifier = build_model(ModelConfig("mlp", {"width": 5, "depth": 1}), (3,), 2)
    torch.manual_seed(0)
    expected = nn.Linear(3, 5), nn.Linear(5, 2)
    assert torch.equal(featurizer[1].weight, expected[0].weight)
    assert torch.equal(classifier.bias, expected[1].bias)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig("mnist_cnn"), r"unknown featurizer 'mnist_cnn'; did you mean 'mnist-cnn'\? \(known: .*mlp"),
        (ModelConfig("mlp", {"widht": 3}), r"featurizer 'mlp' cannot be built: .*unexpected keyword argument 'widht'"),
        (ModelConfig("mlp", {"width": "3"}), r"featurizer 'mlp' cannot be built: "),
        (ModelConfig("mlp", {"width": 0}), r"an MLP needs a width and a depth of at least 1"),
        (ModelConfig("mlp", init="zeros"), r"init must be 'default' or 'xavier', got 'zeros'"),
    ],
)
def test_a_network_that_cannot_be_built(config: ModelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(config, (3,), 2)
