"""Spectral decoupling."""

from dataclasses import dataclass

from torch import Tensor

from fishr.algorithms.base import Reference
from fishr.algorithms.penalized import PenalizedAlgorithm, PenalizedConfig
from fishr.data.base import DomainBatch, Kind
from fishr.space import Distribution, LogUniform


@dataclass(frozen=True)
class SDConfig(PenalizedConfig):
    """Hyperparameters of spectral decoupling; the penalty acts from the first step."""

    penalty_weight: float = 0.1
    switch_on: int | float = 0

    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        return super().space(kind) | {"penalty_weight": LogUniform(1e-5, 1e-1)}


class SD(PenalizedAlgorithm):
    """Small logits, so that no feature learned early starves the others of gradient.

    objective = 1/n Σ_i ℓ_i + λ · mean over samples and classes of logit²

    With cross-entropy alone, a sample that one feature classifies with confidence has hardly a gradient left to learn
    another from. L2 on the logits bounds that confidence, and a model that uses more features depends less on one
    that a new domain lacks. Domains play no part.
    """

    title = "SD"
    reference = Reference(
        "Pezeshki and others",
        "Gradient Starvation: A Learning Proclivity in Neural Networks",
        2021,
        venue="NeurIPS",
        arxiv="2011.09468",
    )
    for_classes = True
    Config = SDConfig
    config: SDConfig

    def risk_and_penalty(self, features: Tensor, batch: DomainBatch) -> tuple[Tensor, Tensor]:
        logits = self.logits(features)
        return self.sample_losses(logits, batch.targets).mean(), logits.square().mean()
