"""Risk extrapolation with the variance of risks."""

from dataclasses import dataclass

from torch import Tensor

from fishr.algorithms.base import Reference
from fishr.algorithms.penalized import SWITCH_ON, PenalizedAlgorithm, PenalizedConfig
from fishr.data.base import DomainBatch, Kind
from fishr.functional.penalty import Reduction
from fishr.space import Distribution, LogUniform


@dataclass(frozen=True)
class VRExConfig(PenalizedConfig):
    """Hyperparameters of V-REx.

    Attributes:
        reduction: ``"mean"``: population variance of the domains' risks (DomainBed); ``"sum"``: sum over pairs of
            domains of the squared difference of their risks, |E|² times as much (the Colored MNIST script).
    """

    penalty_weight: float = 10.0
    switch_on: int | float = 0.1
    weight_before: float = 1.0
    reduction: Reduction = "mean"

    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        return super().space(kind) | {
            "penalty_weight": LogUniform(1e-1, 1e5),
            "switch_on": SWITCH_ON,
        }


class VREx(PenalizedAlgorithm):
    """Equal risks in all domains.

    objective = 1/|E| Σ_e R_e + λ · Var_e(R_e)

    Domains more extreme than those seen are extrapolations of their differences; where the risks are equal, they stay
    equal along these too.
    """

    title = "V-REx"
    reference = Reference(
        "Krueger and others",
        "Out-of-Distribution Generalization via Risk Extrapolation (REx)",
        2021,
        venue="ICML",
        arxiv="2003.00688",
    )
    min_domains = 2
    Config = VRExConfig
    config: VRExConfig

    def risk_and_penalty(self, features: Tensor, batch: DomainBatch) -> tuple[Tensor, Tensor]:
        risks = self.domain_risks(self.logits(features), batch)
        variance = risks.var(correction=0)
        return risks.mean(), variance if self.config.reduction == "mean" else variance * len(risks) ** 2
