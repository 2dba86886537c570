"""How far the statistics of domains lie apart, and which domain is the outlier."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fishr.analysis.statistics import Quantity, Statistics, pooled

Halves = tuple[Statistics, Statistics]
"""Statistics of the two halves of a domain's samples, drawn at random."""

BEYOND_SAMPLING = 2.0
"""A distance is one between domains, not between samples, from this multiple on of what sampling gives."""

STANDS_OUT = 1.25
"""A domain is the outlier from this multiple on of the others' distances."""


@dataclass(frozen=True, eq=False)
class Distances:
    """Distances of one quantity q between domains, each ``[domain, domain]``.

    Attributes:
        distance: ‖q_a − q_b‖.
        sampling: What it is expected to be where only the samples differ: its square is a quarter of the sum of the
            squared distances between the halves of a and between those of b.
        relative: The distance over the root mean square of ‖q_a‖ and ‖q_b‖; √2 where they are orthogonal.
    """

    distance: NDArray[np.float64]
    sampling: NDArray[np.float64]
    relative: NDArray[np.float64]

    @property
    def between_domains(self) -> NDArray[np.float64]:
        """The distance without what sampling adds: √max(0, distance² − sampling²)."""
        apart: NDArray[np.float64] = np.sqrt(np.maximum(self.distance**2 - self.sampling**2, 0))
        return apart


def distances(domains: Sequence[Halves], quantity: Quantity) -> Distances:
    """Distances of a quantity between all pairs of domains."""
    values = [pooled(halves).of(quantity) for halves in domains]
    norms = np.array([value.norm().item() for value in values])
    distance = _pairwise(values)
    halves = np.array([(first.of(quantity) - second.of(quantity)).norm().item() for first, second in domains])
    sampling = np.sqrt(halves[:, None] ** 2 + halves**2) / 2
    np.fill_diagonal(sampling, 0)
    scale = np.sqrt((norms[:, None] ** 2 + norms**2) / 2)
    relative = np.divide(distance, scale, out=np.zeros_like(distance), where=scale > 0)
    return Distances(distance, sampling, relative)


def correlation(statistics: Statistics) -> float | None:
    """Pearson's correlation, over weights, of the gradient variance with the Hessian's diagonal.

    None where one of them is the same for all weights.
    """
    variance, hessian = statistics.variance.numpy(), statistics.hessian.numpy()
    if np.ptp(variance) == 0 or np.ptp(hessian) == 0:
        return None
    return float(np.corrcoef(variance, hessian)[0, 1])


@dataclass(frozen=True)
class Outlier:
    """The domain that lies farthest from the others.

    Attributes:
        domain: Its name.
        ratio: Root mean square of its distances to the others, over that of the distances among the others; what
            sampling adds is left out of both. Infinite where the others agree.
        stands_out: Whether it is the outlier, or merely the farthest.
    """

    domain: str
    ratio: float
    stands_out: bool


def outlier(names: Sequence[str], apart: Distances) -> Outlier | None:
    """The domain farthest from the others; None of two domains, or where domains differ no more than samples do."""
    if len(names) < 3:
        return None
    squares = apart.between_domains**2
    candidates = []
    for index in range(len(names)):
        others = [other for other in range(len(names)) if other != index]
        own = squares[index, others].mean()
        rest = np.mean([squares[pair] for pair in combinations(others, 2)])
        candidates.append((own, index, math.sqrt(own / rest) if rest > 0 else math.inf))
    own, index, ratio = max(candidates)
    differs = apart.distance[index] > BEYOND_SAMPLING * apart.sampling[index]
    if own == 0 or not differs.any():
        return None
    return Outlier(names[index], ratio, ratio >= STANDS_OUT)


def outlier_sentence(names: Sequence[str], apart: Distances, what: str) -> str:
    """Which domain is the outlier by the distances of what is named, in one sentence."""
    if len(names) < 3:
        return f"Of {len(names)} domains none can be told to be the outlier: that takes three."
    found = outlier(names, apart)
    if found is None:
        return f"No domain stands out: the {what} of the domains differ no more than those of samples of one domain do."
    if math.isinf(found.ratio):
        return f"{found.domain!r} is the outlier: its {what} differ from those of all others, which agree."
    if found.stands_out:
        return (
            f"{found.domain!r} is the outlier: its {what} lie {found.ratio:.1f} times as far from those of the other "
            "domains as those from each other."
        )
    return (
        f"No domain stands out: the {what} of {found.domain!r}, which lie farthest from those of the others, are only "
        f"{found.ratio:.2f} times as far as these from each other."
    )


def _pairwise(values: Sequence[Tensor]) -> NDArray[np.float64]:
    return np.array([[(first - second).norm().item() for second in values] for first in values])
