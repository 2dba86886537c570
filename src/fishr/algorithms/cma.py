"""Closed-form moment alignment."""

from dataclasses import dataclass

from torch import Tensor

from fishr.algorithms.base import Reference
from fishr.algorithms.hessian_alignment import HessianAlignment, HessianAlignmentConfig
from fishr.data.base import DomainBatch, Kind
from fishr.functional.hessian import hessian_distance
from fishr.space import Distribution, LogUniform


@dataclass(frozen=True)
class CMAConfig(HessianAlignmentConfig):
    """Hyperparameters of CMA."""

    gradient_weight: float = 5000.0
    hessian_weight: float = 1000.0

    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        return super().space(kind) | {
            "gradient_weight": LogUniform(1e1, 1e4),
            "hessian_weight": LogUniform(1e1, 1e4),
            "switch_on": LogUniform(100 / 5000, 10_000 / 5000),
        }


class CMA(HessianAlignment):
    """Equal gradients and Hessians of the head in all domains.

    objective = 1/n Σ_i ℓ_i + λ · 1/|E| Σ_e (α/c ‖g_e − ḡ‖² + β/c² ‖H_e − H̄‖²)

    with g_e the gradient and H_e the whole Hessian of R_e with respect to the head, the Frobenius norm, c outputs of
    the head and λ = 1. The divisions by c are those of the authors' code, which the weights belong to; a faster form of
    it compares diagonals alone.

    No Hessian is formed where the head is large: inner products of Hessians are sums over pairs of samples
    (:func:`fishr.functional.hessian.hessian_distance`). The closed form takes cross-entropy, or binary cross-entropy
    with a single logit, without weights.
    """

    title = "CMA"
    reference = Reference(
        "Chen, Si, Zhang, Zhao",
        "Moment Alignment: Unifying Gradient and Hessian Matching for Domain Generalization",
        2025,
        venue="UAI",
        arxiv="2506.07378",
    )
    Config = CMAConfig
    config: CMAConfig

    def risk_and_penalty(self, features: Tensor, batch: DomainBatch) -> tuple[Tensor, Tensor]:
        logits = self.logits(features)
        num_outputs = logits.shape[1]
        gradients = self.gradients(features, logits, batch) / num_outputs**0.5
        distance = hessian_distance(features, logits, batch.sizes, bias=self.bias) / num_outputs**2
        return self.sample_losses(logits, batch.targets).mean(), self.combined(gradients, distance)
