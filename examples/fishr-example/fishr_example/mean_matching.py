"""Matching of the domains' mean features."""

from dataclasses import dataclass

from torch import Tensor

from fishr.algorithms import Reference
from fishr.algorithms.base import domain_means
from fishr.algorithms.penalized import PenalizedAlgorithm, PenalizedConfig
from fishr.data import DomainBatch
from fishr.data.base import Kind
from fishr.space import Distribution, LogUniform


@dataclass(frozen=True)
class MeanMatchingConfig(PenalizedConfig):
    """Hyperparameters of mean matching."""

    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        return super().space(kind) | {"penalty_weight": LogUniform(0.1, 10.0)}


class MeanMatching(PenalizedAlgorithm):
    """Equal mean features in all domains.

    objective = 1/n Σ_i ℓ_i + λ · Σ_e ‖m_e − m̄‖², with m_e the mean feature of domain e and m̄ the mean of them

    For two domains the penalty is half of the paper's MMD², the squared distance of their means.
    """

    title = "Mean matching"
    reference = Reference(
        "Tzeng, Hoffman, Zhang, Saenko, Darrell",
        "Deep Domain Confusion: Maximizing for Domain Invariance",
        2014,
        arxiv="1412.3474",
    )
    min_domains = 2
    Config = MeanMatchingConfig
    config: MeanMatchingConfig

    def risk_and_penalty(self, features: Tensor, batch: DomainBatch) -> tuple[Tensor, Tensor]:
        risk = self.sample_losses(self.logits(features), batch.targets).mean()
        means = domain_means(features.to(self.classifier.weight.dtype), batch)
        return risk, (means - means.mean(0)).square().sum()
