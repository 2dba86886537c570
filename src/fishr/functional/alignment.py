"""Distances between two samples of features: what feature alignment makes small.

Features of half precision are widened to float32.
"""

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]

KERNEL_GAMMAS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
"""Of the Gaussian kernels exp(-gamma · d²), from the widest to the narrowest."""


def mean_over_pairs(distance: Distance, parts: Sequence[Tensor]) -> Tensor:
    """Mean of a distance over all pairs of parts, a scalar.

    >>> mean_over_pairs(lambda a, b: (a - b).abs(), [torch.tensor(1.0), torch.tensor(2.0), torch.tensor(4.0)])
    tensor(2.)
    """
    return torch.stack([distance(first, second) for first, second in combinations(parts, 2)]).mean()


def moment_distance(first: Tensor, second: Tensor) -> Tensor:
    """Distance of means and covariances.

        mean over features of (m_1 − m_2)² + mean over pairs of features of (C_1 − C_2)²

    with the mean m and the unbiased covariance C of the features of a sample (Sun and Saenko, Deep CORAL,
    arXiv 1607.01719, without its factor of 1/4 and with the means, as in DomainBed).

    Args:
        first: ``[sample, feature]``, at least two samples.
        second: ``[sample, feature]``, at least two samples.

    Returns:
        A scalar.

    >>> moment_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]]))  # (1 - 3)² + (2 - 8)²
    tensor(40.)
    """
    first, second = _widened(first), _widened(second)
    means = first.mean(0) - second.mean(0)
    covariances = _covariance(first) - _covariance(second)
    return means.square().mean() + covariances.square().mean()


def maximum_mean_discrepancy(first: Tensor, second: Tensor) -> Tensor:
    """Squared maximum mean discrepancy under a sum of Gaussian kernels.

        mean k(x, x') + mean k(y, y') − 2 mean k(x, y), k(a, b) = Σ_γ exp(−γ ‖a − b‖²)

    with γ in :data:`KERNEL_GAMMAS`; means run over all pairs, those of a sample with itself included (Gretton and
    others, JMLR 2012, equation 5).

    Args:
        first: ``[sample, feature]``.
        second: ``[sample, feature]``.

    Returns:
        A scalar.
    """
    first, second = _widened(first), _widened(second)
    return _kernel(first, first).mean() + _kernel(second, second).mean() - 2 * _kernel(first, second).mean()


def _covariance(features: Tensor) -> Tensor:
    """Unbiased, ``[feature, feature]``. Not torch.cov, which makes the host wait for an accelerator."""
    centered = features - features.mean(0)
    return centered.T @ centered / (len(features) - 1)


def _kernel(first: Tensor, second: Tensor) -> Tensor:
    """K of all pairs, ``[sample of first, sample of second]``."""
    squares = first.square().sum(1, keepdim=True) + second.square().sum(1)
    distances = (squares - 2 * first @ second.T).clamp_min(1e-30)  # not 0: no gradient where rounding made it negative
    return torch.stack([torch.exp(-gamma * distances) for gamma in KERNEL_GAMMAS]).sum(0)


def _widened(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))
