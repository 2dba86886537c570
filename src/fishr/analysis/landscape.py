"""The risk of each domain along a line between two networks, and in a random plane through one."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call

from fishr.analysis.head import loss_of
from fishr.data.base import Samples
from fishr.functional.residuals import per_sample_losses
from fishr.models.saved import SavedModel

LINE = np.linspace(-0.5, 1.5, 21)
PLANE = np.linspace(-1.0, 1.0, 11)


@dataclass(frozen=True, eq=False)
class Line:
    """Risks along w(t) = (1 − t) w_first + t w_second.

    Attributes:
        positions: t, ``[position]``.
        risks: Mean loss of each domain in nats, ``[position]``.
    """

    positions: NDArray[np.float64]
    risks: Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class Plane:
    """Risks at w + x · u + y · v, with two random directions u and v.

    Attributes:
        positions: x, and y, ``[position]``: 0 is the network itself.
        risks: Mean loss of each domain in nats, ``[x, y]``.
    """

    positions: NDArray[np.float64]
    risks: Mapping[str, NDArray[np.float64]]


def are_comparable(first: SavedModel, second: SavedModel) -> bool:
    """Whether a line between the weights of two networks means something: equal architecture, and classes in order."""
    one, other = first.card, second.card
    return (one.model.featurizer, dict(one.model.options), one.input_shape, one.classes, one.binary) == (
        other.model.featurizer,
        dict(other.model.options),
        other.input_shape,
        other.classes,
        other.binary,
    )


def line_between(first: SavedModel, second: SavedModel, domains: Mapping[str, Samples], batch_size: int) -> Line:
    """Risks along the line from one network to another, at the positions :data:`LINE`.

    Weights are interpolated, and extrapolated beyond the networks; running statistics are interpolated only, since a
    variance must not become negative.

    Args:
        first: The network at 0.
        second: One of the same architecture (:func:`are_comparable`), at 1.
        domains: The samples of each domain.
        batch_size: Samples that go through the network together.
    """
    start = first.state_dict()
    difference = {name: end - start[name] for name, end in second.state_dict().items()}
    statistics = dict(first.named_buffers())
    risks = []
    for position in LINE:
        within = min(1.0, max(0.0, position))
        moved = {
            name: value + (within if name in statistics else position) * difference[name]
            if value.is_floating_point()
            else value
            for name, value in start.items()
        }
        risks.append(_risks(first, moved, domains, batch_size))
    return Line(LINE, {name: np.array([risk[name] for risk in risks]) for name in domains})


def plane_around(
    model: SavedModel, domains: Mapping[str, Samples], generator: torch.Generator, batch_size: int
) -> Plane:
    """Risks in a random plane through the weights, at the positions :data:`PLANE` in both directions.

    The directions are normal random numbers, scaled filter by filter to the norm of the weights (Li and others,
    Visualizing the Loss Landscape of Neural Nets, NeurIPS 2018, arXiv 1712.09913): at 1 each filter has moved by as
    much as its own length. Biases, and weights of normalisation layers, stay.

    Args:
        model: The network.
        domains: The samples of each domain.
        generator: Source of the directions.
        batch_size: Samples that go through the network together.
    """
    weights = model.state_dict()
    first, second = (_filter_normalised(model, generator) for _ in range(2))
    risks = {name: np.empty((len(PLANE), len(PLANE))) for name in domains}
    for (row, x), (column, y) in product(enumerate(PLANE), repeat=2):
        moved = weights | {name: weights[name] + x * first[name] + y * second[name] for name in first}
        for name, risk in _risks(model, moved, domains, batch_size).items():
            risks[name][row, column] = risk
    return Plane(PLANE, risks)


def _filter_normalised(model: SavedModel, generator: torch.Generator) -> dict[str, Tensor]:
    """A random direction for each parameter that has filters."""
    directions = {}
    for name, weights in model.named_parameters():
        if weights.ndim > 1:
            direction = torch.randn(weights.shape, generator=generator).to(weights.device).flatten(1)
            lengths = weights.detach().flatten(1).norm(dim=1, keepdim=True)
            directions[name] = (direction / direction.norm(dim=1, keepdim=True) * lengths).reshape(weights.shape)
    return directions


@torch.no_grad()
def _risks(
    model: SavedModel, weights: Mapping[str, Tensor], domains: Mapping[str, Samples], batch_size: int
) -> dict[str, float]:
    loss, risks = loss_of(model), {}
    for name, (inputs, targets) in domains.items():
        risk = 0.0
        for batch in torch.split(torch.arange(len(targets)), batch_size):
            logits = functional_call(model, dict(weights), (inputs[batch],)).cpu()
            risk += per_sample_losses(loss, logits.double(), targets[batch]).sum().item() / len(targets)
        risks[name] = risk
    return risks
