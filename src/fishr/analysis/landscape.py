"""The risk of each domain along a line between two networks, and in a random plane through one."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call

from fishr.analysis.head import loss_of
from fishr.data.base import Samples
from fishr.errors import DataError
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


def line_between(first: SavedModel, second: SavedModel, domains: Mapping[str, Samples]) -> Line:
    """Risks along the line from one network to another, at the positions :data:`LINE`.

    All weights and running statistics are interpolated.

    Raises:
        DataError: networks of different architectures.
    """
    start, end = first.state_dict(), second.state_dict()
    if (first.card.model.featurizer, dict(first.card.model.options)) != (
        second.card.model.featurizer,
        dict(second.card.model.options),
    ) or {name: value.shape for name, value in start.items()} != {name: value.shape for name, value in end.items()}:
        raise DataError(
            "the two models have different architectures, and no line runs between their weights: compare models with "
            "the same network"
        )
    risks = [_risks(first, _moved(start, t, {name: end[name] - start[name] for name in start}), domains) for t in LINE]
    return Line(LINE, {name: np.array([risk[name] for risk in risks]) for name in domains})


def plane_around(model: SavedModel, domains: Mapping[str, Samples], seed: int) -> Plane:
    """Risks in a random plane through the weights, at the positions :data:`PLANE` in both directions.

    The directions are normal random numbers, scaled filter by filter to the norm of the weights (Li and others,
    Visualizing the Loss Landscape of Neural Nets, NeurIPS 2018, arXiv 1712.09913): at 1 each filter has moved by as
    much as its own length. Biases, and weights of normalisation layers, stay.

    Args:
        model: The network.
        domains: The samples of each domain.
        seed: Seed of the directions.
    """
    weights = model.state_dict()
    generator = torch.Generator().manual_seed(seed)
    directions = [_filter_normalised(model, generator) for _ in range(2)]
    risks: dict[str, list[list[float]]] = {name: [] for name in domains}
    for x in PLANE:
        row = [_risks(model, _moved(_moved(weights, x, directions[0]), y, directions[1]), domains) for y in PLANE]
        for name in domains:
            risks[name].append([risk[name] for risk in row])
    return Plane(PLANE, {name: np.array(values) for name, values in risks.items()})


def _filter_normalised(model: SavedModel, generator: torch.Generator) -> dict[str, Tensor]:
    """A random direction for each parameter that has filters."""
    directions = {}
    for name, weights in model.named_parameters():
        if weights.ndim > 1:
            direction = torch.randn(weights.shape, generator=generator).to(weights.device).flatten(1)
            lengths = weights.detach().flatten(1).norm(dim=1, keepdim=True)
            directions[name] = (direction / direction.norm(dim=1, keepdim=True) * lengths).reshape(weights.shape)
    return directions


def _moved(weights: Mapping[str, Tensor], distance: float, direction: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights and running statistics after a step; whole numbers, such as counts of batches, stay."""
    return {
        name: value + distance * direction[name] if name in direction and value.is_floating_point() else value
        for name, value in weights.items()
    }


@torch.no_grad()
def _risks(model: SavedModel, weights: Mapping[str, Tensor], domains: Mapping[str, Samples]) -> dict[str, float]:
    loss, risks = loss_of(model), {}
    for name, samples in domains.items():
        logits = functional_call(model, dict(weights), (samples.inputs[:],))
        risks[name] = per_sample_losses(loss, logits.float(), samples.targets.to(logits.device)).mean().item()
    return risks
