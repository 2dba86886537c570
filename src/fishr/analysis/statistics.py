"""What the per-sample gradients and the curvature of one domain are like."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

Quantity = Literal["gradient", "variance", "fisher", "hessian", "whole_hessian"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
DIAGONALS = QUANTITIES[:4]
"""Those with an entry for each weight."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """Means over the samples of a domain, for some of the network's weights.

    With g_i the gradient of the loss of sample i, all squares elementwise. The weights lie in the order of the
    parameters, each flattened.

    Attributes:
        samples: n.
        risk: Mean loss, in nats.
        accuracy: Share of samples whose most probable class is theirs.
        gradient: 1/n Σ_i g_i, float64 ``[weight]``.
        fisher: 1/n Σ_i g_i², the diagonal of the empirical Fisher information, of the true labels, float64
            ``[weight]``. That of labels drawn from the model is, for a linear head, ``hessian``.
        hessian: The diagonal of the Hessian of the risk, float64 ``[weight]``.
        spreads: Of a quantity, the expected squared distance, over weights, between its value and that of other n
            samples of the same domain is twice this: 1/(n(n − 1)) Σ_i ‖ψ_i − ψ̄‖² with ψ_i what sample i adds to the
            quantity to first order, g_i, g_i², its Hessian, or g_i² − 2 ḡ ∘ g_i for the variance. For independent
            samples; quantities are left out for which it is not known.
        whole_hessian: The Hessian of the risk, float64 ``[weight, weight]``, where it is small enough.
        hessian_error: Expected norm of the error of ``hessian``, where that is an estimate, over its norm.
    """

    samples: int
    risk: float
    accuracy: float
    gradient: Tensor
    fisher: Tensor
    hessian: Tensor
    spreads: Mapping[Quantity, float]
    whole_hessian: Tensor | None = None
    hessian_error: float = 0.0

    @property
    def variance(self) -> Tensor:
        """1/n Σ_i g_i² − (1/n Σ_i g_i)², what Fishr matches, float64 ``[weight]``."""
        return self.fisher - self.gradient.square()

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """Those that there are."""
        return DIAGONALS if self.whole_hessian is None else QUANTITIES

    def of(self, quantity: Quantity) -> Tensor:
        """One of :attr:`quantities`, float64."""
        values: Tensor = getattr(self, quantity)
        return values


def spread(mean_square: float, mean: Tensor, samples: int) -> float:
    """1/(n(n − 1)) Σ_i ‖ψ_i − ψ̄‖², at least 0.

    Args:
        mean_square: 1/n Σ_i ‖ψ_i‖².
        mean: ψ̄.
        samples: n, at least 2.
    """
    return max(0.0, mean_square - mean.square().sum().item()) / (samples - 1)


def variance_spread(fourth: float, third: Tensor, fisher: Tensor, gradient: Tensor, samples: int) -> float:
    """The spread of the gradient variance, ψ_i = g_i² − 2 ḡ ∘ g_i.

    Args:
        fourth: 1/n Σ_i Σ_j g_ij⁴.
        third: 1/n Σ_i g_i³, ``[weight]``.
        fisher: 1/n Σ_i g_i², ``[weight]``.
        gradient: ḡ, ``[weight]``.
        samples: n, at least 2.
    """
    mean_square = fourth - 4 * (gradient @ third).item() + 4 * (gradient.square() @ fisher).item()
    return spread(mean_square, fisher - 2 * gradient.square(), samples)
