"""Correlation alignment."""

from dataclasses import dataclass

from torch import Tensor

from fishr.algorithms.base import Reference
from fishr.algorithms.penalized import PenalizedAlgorithm, PenalizedConfig
from fishr.data.base import DomainBatch, Kind
from fishr.functional.alignment import mean_over_pairs, moment_distance
from fishr.space import Distribution, LogUniform


@dataclass(frozen=True)
class CORALConfig(PenalizedConfig):
    """Hyperparameters of CORAL; the penalty acts from the first step."""

    penalty_weight: float = 1.0
    switch_on: int | float = 0

    def least_batch_size(self) -> int:
        return 2  # one sample has no covariance

    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        return super().space(kind) | {"penalty_weight": LogUniform(0.1, 10.0)}


class CORAL(PenalizedAlgorithm):
    """Equal means and covariances of the features in all domains.

    objective = 1/|E| Σ_e R_e + λ · mean over pairs of domains of d(a, b)

    d(a, b) = mean_j (m_a − m_b)_j² + mean_jk (C_a − C_b)_jk², with m_e the mean and C_e the unbiased covariance of the
    features of domain e (:func:`fishr.functional.alignment.moment_distance`). A head that works on features which look
    alike in all domains may work where they look alike in a new one. The published method, for one source and
    one target, aligns covariances alone; across domains the means are aligned too, as in DomainBed.
    """

    title = "CORAL"
    reference = Reference(
        "Sun, Saenko", "Deep CORAL: Correlation Alignment", 2016, venue="ECCV Workshops", arxiv="1607.01719"
    )
    min_domains = 2
    Config = CORALConfig
    config: CORALConfig

    def risk_and_penalty(self, features: Tensor, batch: DomainBatch) -> tuple[Tensor, Tensor]:
        risk = self.domain_risks(self.logits(features), batch).mean()
        return risk, mean_over_pairs(moment_distance, batch.split(features))
