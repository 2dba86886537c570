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
    """Minimise the risk of the worst domain, by domain weights that grow with its risk.

    objective = Σ_e q_e R_e, after q_e ← q_e exp(η R_e) and q ← q / Σ_e q_e

    The problem is min over the network, max over q (q_e ≥ 0, Σ_e q_e = 1) of Σ_e q_e R_e, the risk of the worst domain.
    At each step q, uniform at first, takes a step of exponentiated gradient ascent, so that q_e ∝ exp(η · the sum of
    the domain's risks so far); then the network descends, with q constant. A low risk in the worst domain is a low risk
    in every mixture of the training domains. The groups of the paper are the training domains; its algorithm 1 draws
    one group per step, here all are in the batch.
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
        risks = self.domain_risks(self.logits(self.features(batch)), batch)
        grown = self.domain_weights * torch.exp(self.config.eta * risks.detach())
        q = grown / grown.sum()
        self.domain_weights.copy_(q)
        return Losses((q * risks).sum() + self.l2_term(), {"risk": risks.mean(), "worst_risk": risks.max()})
