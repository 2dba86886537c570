"""Inter-gradient alignment."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fishr.algorithms.base import Reference, domain_gradients
from fishr.algorithms.penalized import PenalizedAlgorithm, PenalizedConfig
from fishr.data.base import DomainBatch, Kind
from fishr.space import Distribution, LogUniform


@dataclass(frozen=True)
class IGAConfig(PenalizedConfig):
    """Hyperparameters of IGA; the penalty acts from the first step."""

    penalty_weight: float = 1000.0
    switch_on: int | float = 0

    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        return super().space(kind) | {"penalty_weight": LogUniform(1e1, 1e5)}


class IGA(PenalizedAlgorithm):
    """Equal gradients of the risks of all domains.

    objective = 1/|E| Σ_e R_e + λ · Σ_e ‖∇R_e − ḡ‖², ḡ = 1/|E| Σ_e ∇R_e

    Gradients are with respect to all weights of featurizer and head; ḡ counts as a constant. Its own gradient takes a
    second backward pass, through the first. ``strength`` is measured where it always is, at the features; this penalty
    reaches the weights also by paths that do not lead through them.
    """

    title = "IGA"
    reference = Reference(
        "Koyama, Yamaguchi",
        "When is Invariance Useful in an Out-of-Distribution Generalization Problem?",
        2020,
        arxiv="2008.01883",
    )
    min_domains = 2
    compiles = False
    Config = IGAConfig
    config: IGAConfig

    def risk_and_penalty(self, features: Tensor, batch: DomainBatch) -> tuple[Tensor, Tensor]:
        risks = self.domain_risks(self.logits(features), batch)
        distances = [
            (gradients - gradients.mean(0).detach()).square().sum()
            for gradients in domain_gradients(risks, self.network_parameters, batch, create_graph=True)
        ]
        return risks.mean(), torch.stack(distances).sum()
