"""What the per-sample gradients and the curvature of one domain are like."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Quantity = Literal["gradient", "variance", "fisher", "hessian"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)


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
        whole_hessian: The Hessian of the risk, float64 ``[weight, weight]``, where it is small enough.
    """

    samples: int
    risk: float
    accuracy: float
    gradient: Tensor
    fisher: Tensor
    hessian: Tensor
    whole_hessian: Tensor | None = None

    @property
    def variance(self) -> Tensor:
        """1/n Σ_i g_i² − (1/n Σ_i g_i)², what Fishr matches, float64 ``[weight]``."""
        return self.fisher - self.gradient.square()

    def of(self, quantity: Quantity) -> Tensor:
        """One of the four, float64 ``[weight]``."""
        values: Tensor = getattr(self, quantity)
        return values


def pooled(parts: Sequence[Statistics]) -> Statistics:
    """The statistics of the samples of all parts together."""
    samples = sum(part.samples for part in parts)
    shares = [part.samples / samples for part in parts]

    def mean(name: str) -> Tensor:
        return torch.stack([share * getattr(part, name) for share, part in zip(shares, parts, strict=True)]).sum(0)

    return Statistics(
        samples,
        sum(share * part.risk for share, part in zip(shares, parts, strict=True)),
        sum(share * part.accuracy for share, part in zip(shares, parts, strict=True)),
        mean("gradient"),
        mean("fisher"),
        mean("hessian"),
        None if any(part.whole_hessian is None for part in parts) else mean("whole_hessian"),
    )
