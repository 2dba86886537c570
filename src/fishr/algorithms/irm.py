"""Invariant risk minimization."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fishr.algorithms.base import Reference
from fishr.algorithms.penalized import SWITCH_ON, PenalizedAlgorithm, PenalizedConfig
from fishr.data.base import DomainBatch, Kind
from fishr.functional.residuals import loss_residuals
from fishr.space import Distribution, LogUniform


@dataclass(frozen=True)
class IRMConfig(PenalizedConfig):
    """Hyperparameters of IRM.

    Attributes:
        estimator: ``"split"``: the product of the derivatives on even- and odd-indexed samples, an unbiased estimate
            of the squared derivative (DomainBed); ``"full"``: the squared derivative on all samples (the Colored
            MNIST script).
    """

    penalty_weight: float = 100.0
    switch_on: int | float = 0.1
    weight_before: float = 1.0
    estimator: Literal["split", "full"] = "split"

    def least_batch_size(self) -> int:
        return 2 if self.estimator == "split" else 1

    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        return super().space(kind) | {
            "penalty_weight": LogUniform(1e-1, 1e5),
            "switch_on": SWITCH_ON,
        }


class IRM(PenalizedAlgorithm):
    """A classifier that is optimal in every domain at once (IRMv1).

    objective = 1/|E| Σ_e R_e + λ · 1/|E| Σ_e (∂R_e(w · f)/∂w at w = 1)²

    Where the slope is zero in a domain, no other multiplier would do better there: the head is optimal in all domains
    at once, so it relies on what tells the label in the same way in each. w is a scalar multiplier of the logits, so
    the derivative has a closed form: the mean over the domain of Σ_k r_ik · logit_ik, with the residuals r.
    """

    title = "IRM"
    reference = Reference(
        "Arjovsky, Bottou, Gulrajani, Lopez-Paz", "Invariant Risk Minimization", 2019, arxiv="1907.02893"
    )
    Config = IRMConfig
    config: IRMConfig

    def risk_and_penalty(self, features: Tensor, batch: DomainBatch) -> tuple[Tensor, Tensor]:
        logits = self.logits(features)
        slopes = (loss_residuals(self.loss, logits, batch.targets) * logits).sum(1)
        penalties = [self._penalty(part) for part in batch.split(slopes)]
        return self.domain_risks(logits, batch).mean(), torch.stack(penalties).mean()

    def _penalty(self, slopes: Tensor) -> Tensor:
        if self.config.estimator == "full":
            return slopes.mean().square()
        return slopes[::2].mean() * slopes[1::2].mean()
