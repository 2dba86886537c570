"""Learning explanations that are hard to vary: the AND-mask."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from fishr.algorithms.base import Algorithm, AlgorithmConfig, Losses, Reference, domain_gradients
from fishr.data.base import DomainBatch, Kind
from fishr.space import Distribution, Uniform


@dataclass(frozen=True)
class ANDMaskConfig(AlgorithmConfig):
    """Hyperparameters of the AND-mask.

    Attributes:
        tau: Agreement τ of the domains' signs that an entry of the gradient needs, from 0 (none) to 1 (all agree).
    """

    tau: float = 1.0

    def problems(self) -> list[str]:
        problems = super().problems()
        if not 0 <= self.tau <= 1:
            problems.append(f"tau must lie in [0, 1], got {self.tau}")
        return problems

    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        return super().space(kind) | {"tau": Uniform(0.5, 1.0)}


class ANDMask(Algorithm):
    """Follow only those entries of the gradient whose sign the domains agree on.

    gradient = m ⊙ ḡ / (share of entries of m that are 1), ḡ = 1/|E| Σ_e ∇R_e

    m = 1 where |1/|E| Σ_e sign ∇R_e| ≥ τ, else 0, entry by entry; the share is that of each weight tensor, so that a
    tensor's step keeps its size however many of its entries are masked. Adam runs on this gradient.
    """

    title = "AND-mask"
    reference = Reference(
        "Parascandolo, Neitz, Orvieto, Gresele, Schölkopf",
        "Learning Explanations that are Hard to Vary",
        2021,
        venue="ICLR",
        arxiv="2009.00329",
    )
    min_domains = 2
    compiles = False
    Config: ClassVar[type[AlgorithmConfig]] = ANDMaskConfig
    config: ANDMaskConfig

    def training_step(self, batch: DomainBatch, step: int, optimizers: Mapping[str, Optimizer]) -> Losses:
        risks = self.domain_risks(self.logits(self.features(batch)), batch)
        objectives = risks + self.l2_term()
        weights = self.network_parameters
        for weight, gradients in zip(weights, domain_gradients(objectives, weights, batch), strict=True):
            mask = self.mask(gradients)
            weight.grad = mask * gradients.mean(0) / (1e-10 + mask.mean())
        optimizers["main"].step()
        return Losses(objectives.mean(), {"risk": risks.mean()})

    def mask(self, gradients: Tensor) -> Tensor:
        """What is kept of each entry, from the domains' gradients ``[domain, ...]`` of a weight tensor."""
        return (agreement(gradients) >= self.config.tau).to(gradients.dtype)


def agreement(gradients: Tensor) -> Tensor:
    """|mean over domains of the sign|: 1 where all domains agree, 0 where they are divided."""
    return torch.sign(gradients).mean(0).abs()
