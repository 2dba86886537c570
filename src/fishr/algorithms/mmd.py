"""Maximum mean discrepancy between the features of domains."""

from dataclasses import dataclass

from torch import Tensor

from fishr.algorithms.base import Reference
from fishr.algorithms.penalized import PenalizedAlgorithm, PenalizedConfig
from fishr.data.base import DomainBatch, Kind
from fishr.functional.alignment import maximum_mean_discrepancy, mean_over_pairs
from fishr.space import Distribution, LogUniform


@dataclass(frozen=True)
class MMDConfig(PenalizedConfig):
    """Hyperparameters of MMD; the penalty acts from the first step."""

    penalty_weight: float = 1.0
    switch_on: int | float = 0

    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        return super().space(kind) | {"penalty_weight": LogUniform(0.1, 10.0)}


class MMD(PenalizedAlgorithm):
    """Equal distributions of the features in all domains, compared by a kernel.

    objective = 1/|E| Σ_e R_e + λ · mean over pairs of domains of MMD²(a, b)

    MMD²(a, b) = mean k(x, x') + mean k(y, y') − 2 mean k(x, y), with x from domain a, y from b, and k a sum of Gaussian
    kernels from wide to narrow (:func:`fishr.functional.alignment.maximum_mean_discrepancy`): it is zero only where the
    distributions are the same. The published method has an adversarial autoencoder besides, which is left out, as in
    DomainBed.
    """

    title = "MMD"
    reference = Reference(
        "Li, Pan, Wang, Kot", "Domain Generalization with Adversarial Feature Learning", 2018, venue="CVPR"
    )
    min_domains = 2
    Config = MMDConfig
    config: MMDConfig

    def risk_and_penalty(self, features: Tensor, batch: DomainBatch) -> tuple[Tensor, Tensor]:
        risk = self.domain_risks(self.logits(features), batch).mean()
        return risk, mean_over_pairs(maximum_mean_discrepancy, batch.split(features))
