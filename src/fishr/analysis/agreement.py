"""How far the statistics of domains lie apart, and which domain is the outlier."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fishr.analysis.statistics import Quantity, Statistics

BEYOND_SAMPLING = 3.0
"""A distance is one between domains, not between samples, from this multiple on of what sampling gives."""

STANDS_OUT = 1.25
"""The outlier lies so many times as far from the others as any other domain does."""


@dataclass(frozen=True, eq=False)
class Distances:
    """Distances of one quantity q between domains, each ``[domain, domain]``.

    Attributes:
        distance: ‖q_a − q_b‖.
        sampling: What it would be, as a root mean square, between samples of one domain as many as those of a and of
            b: the root of the sum of their spreads (:class:`fishr.analysis.statistics.Statistics`). None where these
            are not known.
        relative: The distance over the root mean square of ‖q_a‖ and ‖q_b‖: 0 of equal ones, √2 of orthogonal ones, and
            of such that differ much in size.
    """

    distance: NDArray[np.float64]
    sampling: NDArray[np.float64] | None
    relative: NDArray[np.float64]


def distances(domains: Sequence[Statistics], quantity: Quantity) -> Distances:
    """Distances of a quantity between all pairs of domains."""
    values = [statistics.of(quantity) for statistics in domains]
    distance = _pairwise(values)
    norms = np.array([value.norm().item() for value in values])
    scale = np.sqrt((norms[:, None] ** 2 + norms**2) / 2)
    relative = np.divide(distance, scale, out=np.zeros_like(distance), where=scale > 0)
    sampling = None
    if all(quantity in statistics.spreads for statistics in domains):
        spreads = np.array([statistics.spreads[quantity] for statistics in domains])
        sampling = np.sqrt(spreads[:, None] + spreads)
        np.fill_diagonal(sampling, 0)
    return Distances(distance, sampling, relative)


def correlation(statistics: Statistics) -> float | None:
    """Pearson's correlation, over weights, of the gradient variance with the Hessian's diagonal.

    None where one of them is the same for all weights, and where the diagonal is an estimate: its error would lower it.
    """
    variance, hessian = statistics.variance.numpy(), statistics.hessian.numpy()
    if statistics.hessian_error > 0 or np.ptp(variance) == 0 or np.ptp(hessian) == 0:
        return None
    return float(np.corrcoef(variance, hessian)[0, 1])


@dataclass(frozen=True)
class Outlier:
    """The domain that lies farthest from the others.

    Attributes:
        domain: Its name.
        ratio: Root mean square of its distances to the others, over that of the distances among the others; infinite
            where these agree. What sampling adds is left out of both.
        lead: The former over that of the domain that is second.
        second: That domain.
    """

    domain: str
    ratio: float
    lead: float
    second: str


def farthest(names: Sequence[str], apart: Distances) -> Outlier | None:
    """The domain that lies farthest from the others.

    None of two domains, and where no domain's distances to all others are beyond sampling (:data:`BEYOND_SAMPLING`).
    """
    if len(names) < 3 or apart.sampling is None:
        return None
    squares = np.maximum(apart.distance**2 - apart.sampling**2, 0)
    others = ~np.eye(len(names), dtype=bool)
    own = np.sqrt((squares * others).sum(1) / (len(names) - 1))
    is_beyond = ((apart.distance > BEYOND_SAMPLING * apart.sampling) | ~others).all(1)
    if not is_beyond.any():
        return None
    index = int(np.where(is_beyond, own, -1).argmax())
    second = int(np.where(np.arange(len(names)) == index, -1, own).argmax())
    rest = others & (np.arange(len(names)) != index)[:, None] & (np.arange(len(names)) != index)
    among = math.sqrt(squares[rest].mean())
    return Outlier(
        names[index],
        float(own[index] / among) if among > 0 else math.inf,
        float(own[index] / own[second]),
        names[second],
    )


def outlier_sentence(names: Sequence[str], apart: Distances, what: str) -> str:
    """Which domain is the outlier by the distances of what is named, in one sentence."""
    if len(names) < 3:
        return f"Of {len(names)} domains none can be told to be the outlier: that takes three."
    found = farthest(names, apart)
    if found is None:
        return f"No domain stands out: none has {what} that differ from those of all others beyond doubt."
    if found.lead < STANDS_OUT:
        return (
            f"No domain stands out: the {what} of {found.domain!r} lie farthest from those of the others, but only "
            f"{found.lead:.2f} times as far as those of {found.second!r}."
        )
    if math.isinf(found.ratio):
        return f"{found.domain!r} is the outlier: its {what} differ from those of all others, which agree."
    return (
        f"{found.domain!r} is the outlier: its {what} lie {found.ratio:.1f} times as far from those of the other "
        "domains as those from each other."
    )


def _pairwise(values: Sequence[Tensor]) -> NDArray[np.float64]:
    return np.array([[(first - second).norm().item() for second in values] for first in values])
