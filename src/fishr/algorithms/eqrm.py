"""Empirical quantile risk minimization."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from fishr.algorithms.base import Algorithm, AlgorithmConfig, Losses, Reference
from fishr.algorithms.penalized import step_of, warn_if_never
from fishr.data.base import DomainBatch, Kind
from fishr.space import Distribution, LogUniform, Uniform

BISECTIONS = 32


@dataclass(frozen=True)
class EQRMConfig(AlgorithmConfig):
    """Hyperparameters of EQRM.

    Attributes:
        quantile: α, the probability with which a new domain's risk is to lie below what is minimised.
        burn_in: Steps of ERM at the beginning: a whole number is a step, a decimal a share of the run.
        lr_after: Learning rate after the burn-in, when the optimizer starts anew.
    """

    quantile: float = 0.75
    burn_in: int | float = 0.5
    lr_after: float = 1e-6

    def problems(self) -> list[str]:
        problems = super().problems()
        if not 0 < self.quantile < 1:
            problems.append(f"quantile must lie in (0, 1), got {self.quantile}")
        if self.burn_in < 0:
            problems.append(f"burn_in must be at least 0, got {self.burn_in}")
        if self.lr_after <= 0:
            problems.append(f"lr_after must be above 0, got {self.lr_after}")
        return problems

    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        return super().space(kind) | {
            "quantile": Uniform(0.5, 0.99),
            "burn_in": LogUniform(10**2.5 / 5000, 10**3.5 / 5000),
            "lr_after": LogUniform(1e-7, 1e-5),
        }


class EQRM(Algorithm):
    """Minimise the α-quantile of risk over domains: that of a new domain is lower with probability α.

    objective = F⁻¹(α), F the distribution of the risk over domains: a Gaussian kernel density of R_1, ..., R_|E|

    A new domain is taken to be drawn like those of training. The larger α, the more the largest risk and the spread of
    the risks count (:func:`risk_quantile`). During the burn-in the objective is 1/|E| Σ_e R_e: what EQRM does then, at
    a learning rate of its own, is to fine-tune a model of ERM.
    """

    title = "EQRM"
    reference = Reference(
        "Eastwood and others",
        "Probable Domain Generalization via Quantile Risk Minimization",
        2022,
        venue="NeurIPS",
        arxiv="2207.09944",
    )
    min_domains = 2
    Config = EQRMConfig
    config: EQRMConfig

    def setup(self) -> None:
        self.switch_on_step = step_of("burn_in", self.config.burn_in, self.steps)
        warn_if_never("EQRM's objective", "burn_in", self.config.burn_in, self.switch_on_step, self.steps)

    def losses(self, batch: DomainBatch, step: int) -> Losses:
        risks = self.domain_risks(self.logits(self.features(batch)), batch)
        objective = risks.mean() if step < self.switch_on_step else risk_quantile(risks, self.config.quantile)
        return Losses(objective + self.l2_term(), {"risk": risks.mean()})

    def training_step(self, batch: DomainBatch, step: int, optimizers: Mapping[str, Optimizer]) -> Losses:
        if step == self.switch_on_step:
            optimizer = optimizers["main"]
            optimizer.state.clear()
            for group in optimizer.param_groups:
                group["lr"] = self.config.lr_after
        return super().training_step(batch, step, optimizers)


def risk_quantile(risks: Tensor, alpha: float) -> Tensor:
    """F⁻¹(α) of a Gaussian kernel density of risks ``[domain]``, a scalar.

    F(x) = 1/|E| Σ_e Φ((x − R_e) / h), h = 1.06 σ |E|^(−1/5) (Silverman's rule, σ the unbiased standard deviation).

    F⁻¹(α) lies between the α-quantiles of the kernels at the smallest and at the largest risk; bisection tells how far
    between. The gradient flows through these two ends, with that share as a constant. It is not the derivative of
    F⁻¹(α): as in the authors' code, risks between the ends enter through h alone.
    """
    risks = risks.sort().values
    bandwidth = 1.06 * risks.std() * len(risks) ** -0.2
    level = torch.full_like(bandwidth, alpha)
    ends = torch.stack([risks[0], risks[-1]]) + bandwidth * torch.special.ndtri(level)
    with torch.no_grad():
        below, above = torch.zeros_like(bandwidth), torch.ones_like(bandwidth)
        for _ in range(BISECTIONS):
            share = (below + above) / 2
            reached = torch.special.ndtr((torch.lerp(ends[0], ends[1], share) - risks) / bandwidth).mean()
            below = torch.where(reached < level, share, below)
            above = torch.where(reached < level, above, share)
    return torch.lerp(ends[0], ends[1], (below + above) / 2)
