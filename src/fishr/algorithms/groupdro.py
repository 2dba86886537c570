"""Group distributionally robust optimization."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fishr.algorithms.base import Algorithm, AlgorithmConfig, Losses, Reference
from fishr.data.base import DomainBatch, Kind
from fishr.space import Distribution, LogUniform


@dataclass(frozen=True)
class GroupDROConfig(AlgorithmConfig):
    """Hyperparameters of GroupDRO.

    Attributes:
        eta: Step size η of the domain weights: how fast weight moves to domains of high risk.
    """

    eta: float = 1e-2

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.eta < 0:
            problems.append(f"eta must be at least 0, got {self.eta}")
        return problems

    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        return super().space(kind) | {"eta": LogUniform(1e-3, 1e-1)}


class GroupDRO(Algorithm):
    """Minimise the risk of the worst domain, by weights that grow with the risk.

    objective = Σ_e q_e R_e, with q_e ← q_e · exp(η R_e) / Σ_e' q_e' exp(η R_e') at every step before it is used

    q starts uniform. The updates are exponentiated gradient ascent on min over weights, max over q of Σ_e q_e R_e (the
    paper's algorithm 1); the risks in them are constants.
    """

    title = "GroupDRO"
    reference = Reference(
        "Sagawa, Koh, Hashimoto, Liang",
        "Distributionally Robust Neural Networks for Group Shifts",
        2020,
        venue="ICLR",
        arxiv="1911.08731",
    )
    Config = GroupDROConfig
    config: GroupDROConfig
    domain_weights: Tensor

    def setup(self) -> None:
        self.register_buffer("domain_weights", torch.full((self.num_domains,), 1 / self.num_domains))

    def losses(self, batch: DomainBatch, step: int) -> Losses:
        risks = self.domain_risks(self(batch.inputs), batch)
        grown = self.domain_weights * torch.exp(self.config.eta * risks.detach())
        weights = grown / grown.sum()
        self.domain_weights.copy_(weights)
        return Losses((weights * risks).sum() + self.l2_term(), {"risk": risks.mean(), "worst_risk": risks.max()})
