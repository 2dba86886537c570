"""The information bottleneck with ERM."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fishr.algorithms.base import Reference
from fishr.algorithms.penalized import SWITCH_ON, PenalizedAlgorithm, PenalizedConfig
from fishr.data.base import DomainBatch, Kind
from fishr.space import Distribution, LogUniform


@dataclass(frozen=True)
class IBERMConfig(PenalizedConfig):
    """Hyperparameters of IB-ERM."""

    penalty_weight: float = 100.0
    switch_on: int | float = 0.1

    def least_batch_size(self) -> int:
        return 2  # one sample has no variance

    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        return super().space(kind) | {
            "penalty_weight": LogUniform(1e-1, 1e5),
            "switch_on": SWITCH_ON,
        }


class IBERM(PenalizedAlgorithm):
    """Features that vary as little as the labels allow.

    objective = 1/|E| Σ_e R_e + λ · 1/|E| Σ_e mean over features of their unbiased variance in domain e

    The variance stands for the entropy of the features: of all features that tell the label, those are to be kept
    that say the least besides.
    """

    title = "IB-ERM"
    reference = Reference(
        "Ahuja and others",
        "Invariance Principle Meets Information Bottleneck for Out-of-Distribution Generalization",
        2021,
        venue="NeurIPS",
        arxiv="2106.06607",
    )
    Config = IBERMConfig
    config: IBERMConfig

    def risk_and_penalty(self, features: Tensor, batch: DomainBatch) -> tuple[Tensor, Tensor]:
        risk = self.domain_risks(self.logits(features), batch).mean()
        return risk, feature_variance(features.to(self.classifier.weight.dtype), batch)


def feature_variance(features: Tensor, batch: DomainBatch) -> Tensor:
    """Mean over domains and features of the unbiased variance of a feature in a domain."""
    return torch.stack([part.var(0).mean() for part in batch.split(features)]).mean()
