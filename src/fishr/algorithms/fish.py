"""Gradient matching by a first-order meta-learning step."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from fishr.algorithms.base import Algorithm, AlgorithmConfig, Losses, Reference
from fishr.data.base import DomainBatch, Kind
from fishr.space import Choice, Distribution


@dataclass(frozen=True)
class FishConfig(AlgorithmConfig):
    """Hyperparameters of Fish.

    Attributes:
        meta_lr: Share ε of the way through the domains that the weights really go.
    """

    meta_lr: float = 0.5

    def problems(self) -> list[str]:
        problems = super().problems()
        if not 0 < self.meta_lr <= 1:
            problems.append(f"meta_lr must lie in (0, 1], got {self.meta_lr}")
        return problems

    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        return super().space(kind) | {"meta_lr": Choice((0.05, 0.1, 0.5))}


class Fish(Algorithm):
    """Large inner products between the domains' gradients, without second derivatives.

    weights ← weights + ε (stepped − weights), stepped = weights after one Adam step on R_1, then R_2, ..., R_|E|

    Going through the domains one after the other, in expectation over their order, favours directions in which the
    gradients of all of them point alike (the paper's theorem 3.1). The state of Adam is kept from step to step. Running
    statistics of batch-norm layers go the same share of their way.
    """

    title = "Fish"
    reference = Reference(
        "Shi, Seely, Torr, Siddharth, Hannun, Usunier, Synnaeve",
        "Gradient Matching for Domain Generalization",
        2022,
        venue="ICLR",
        arxiv="2104.09937",
    )
    min_domains = 2
    Config = FishConfig
    config: FishConfig

    def training_step(self, batch: DomainBatch, step: int, optimizers: Mapping[str, Optimizer]) -> Losses:
        statistics = [buffer for buffer in self.featurizer.buffers() if buffer.is_floating_point()]
        weights = [*self.network_parameters, *statistics]
        before = [weight.detach().clone() for weight in weights]
        risks, totals = [], []
        for part in batch.parts:
            risks.append(self.sample_losses(self.logits(self.features(part)), part.targets).mean())
            totals.append(risks[-1] + self.l2_term())
            optimizers["main"].zero_grad()
            totals[-1].backward()  # type: ignore[no-untyped-call]
            optimizers["main"].step()
        with torch.no_grad():
            for weight, start in zip(weights, before, strict=True):
                weight.copy_(torch.lerp(start, weight, self.config.meta_lr))
        return Losses(torch.stack(totals).mean(), {"risk": torch.stack(risks).mean()})
