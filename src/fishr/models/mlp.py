"""Multilayer perceptron."""

import math

from torch import nn

from fishr.errors import ConfigError


class MLP(nn.Sequential):
    """``depth`` times a linear layer of ``width`` units and a ReLU, on the flattened input.

    Args:
        input_shape: Shape of one input.
        width: Units of each layer, and features returned.
        depth: Number of layers.
    """

    def __init__(self, input_shape: tuple[int, ...], width: int = 128, depth: int = 2) -> None:
        if width < 1 or depth < 1:
            raise ConfigError(f"an MLP needs a width and a depth of at least 1, got {width} and {depth}")
        layers: list[nn.Module] = [nn.Flatten()]
        num_inputs = math.prod(input_shape)
        for _ in range(depth):
            layers += [nn.Linear(num_inputs, width), nn.ReLU()]
            num_inputs = width
        super().__init__(*layers)
        self.num_features = width
