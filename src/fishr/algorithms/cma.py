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
    """Hyperparameters of CMA.

    Attributes:
        gradient_weight: α, the weight of the distance between the domains' gradients.
        hessian_weight: β, the weight of the distance between the domains' Hessians.
    """

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

    with g_e the gradient and H_e the Hessian of R_e with respect to the head, a bar for the mean over domains, the
    Frobenius norm of all entries, c outputs of the head, α and β the gradient and the Hessian weight, and λ the penalty
    weight, 1 as published. Equal gradients and Hessians make the domains' loss landscapes alike around the weights, and
    so are moments of the features. The divisions by c are those of the authors' code, which α and β belong to; a faster
    variant there compares diagonals alone.

    No Hessian of a large head is formed: ‖H_e − H̄‖² is a sum over pairs of samples, of inner products of their features
    and their probabilities (:func:`fishr.functional.hessian.hessian_distance`). The closed form takes cross-entropy, or
    binary cross-entropy with a single logit, without class weights.
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
        gradients = self.gradients(features, logits, batch) / num_outputs**0.5  # squared in the penalty
        distance = hessian_distance(features, logits, batch.sizes, bias=self.bias) / num_outputs**2
        return self.sample_losses(logits, batch.targets).mean(), self.combined(gradients, distance)
