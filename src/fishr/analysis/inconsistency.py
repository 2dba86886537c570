"""Inconsistency of domains: what a step that domain A does not mind can do to domain B.

Around weights θ* with small gradients, the loss of A stays within ε of what it is in the region ½ θᵀ H_A θ ≤ ε (θ
relative to θ*). The inconsistency of the ordered pair (A, B) is how far the loss of B can lie above that of A there,
and the score the largest over pairs (Rame et al., ICML 2022, section 4, arXiv 2109.02934):

    I = max over (A, B) of  R_B − R_A + max over ½ θᵀ H_A θ ≤ ε of ½ θᵀ H_B θ

The inner maximum is ε times the largest generalised eigenvalue of (H_B, H_A), and with diagonal Hessians
ε · max_i h_B,i / h_A,i. It is infinite where H_A is flat in a direction in which H_B is not, as softmax's shift and
features that are zero make it. So H_A is damped: δ, a share of the mean of its diagonal, is added to the latter, and
the region ends in such directions too. The ratio depends on that share where flat directions differ: compare scores of
the same share only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

DAMPING = 1e-3
"""δ over the mean of H_A's diagonal."""

TINY = 1e-300
"""δ of networks so certain that their Hessians vanish."""


@dataclass(frozen=True, eq=False)
class Inconsistency:
    """How inconsistent each ordered pair of domains (A, B) is, ``[A, B]``.

    Attributes:
        gaps: R_B − R_A.
        ratios: The largest generalised eigenvalue, or ratio of the diagonals; 1 of a domain with itself.
        epsilon: ε, in nats.
    """

    gaps: NDArray[np.float64]
    ratios: NDArray[np.float64]
    epsilon: float

    @property
    def scores(self) -> NDArray[np.float64]:
        """R_B − R_A + ε · ratio, in nats; I is the largest beside the diagonal."""
        scores: NDArray[np.float64] = self.gaps + self.epsilon * self.ratios
        return scores


def diagonal_inconsistency(
    risks: Sequence[float], diagonals: Sequence[Tensor], epsilon: float, damping: float = DAMPING
) -> Inconsistency:
    """By the Hessians' diagonals alone.

    Args:
        risks: R_e of each domain.
        diagonals: Diagonal of H_e of each domain, ``[weight]``, at least 0.
        epsilon: ε, in nats.
        damping: δ over the mean of H_A's diagonal.
    """
    damped = [diagonal + max(damping * diagonal.mean().item(), TINY) for diagonal in diagonals]
    ratios = np.array([[(second / first).max().item() for second in diagonals] for first in damped])
    np.fill_diagonal(ratios, 1)
    return Inconsistency(_gaps(risks), ratios, epsilon)


def exact_inconsistency(
    risks: Sequence[float], hessians: Sequence[Tensor], epsilon: float, damping: float = DAMPING
) -> Inconsistency:
    """By the whole Hessians.

    Args:
        risks: R_e of each domain.
        hessians: H_e of each domain, ``[weight, weight]``, positive semidefinite.
        epsilon: ε, in nats.
        damping: δ over the mean of H_A's diagonal.
    """
    ratios = np.ones((len(hessians), len(hessians)))
    for index, first in enumerate(hessians):
        delta = max(damping * first.diagonal().mean().item(), TINY)
        damped = first + delta * torch.eye(len(first), dtype=first.dtype)
        for other, second in enumerate(hessians):
            if other != index:
                last = len(first) - 1
                ratios[index, other] = scipy.linalg.eigh(
                    second.numpy(), damped.numpy(), eigvals_only=True, subset_by_index=[last, last]
                )[0]
    return Inconsistency(_gaps(risks), ratios, epsilon)


def _gaps(risks: Sequence[float]) -> NDArray[np.float64]:
    gaps: NDArray[np.float64] = np.subtract.outer(risks, risks).T
    return gaps
