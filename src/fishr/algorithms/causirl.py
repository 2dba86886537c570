"""Invariant causal mechanisms through distribution matching."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fishr.algorithms.base import Reference
from fishr.algorithms.penalized import PenalizedAlgorithm, PenalizedConfig
from fishr.data.base import DomainBatch, Kind
from fishr.functional.alignment import maximum_mean_discrepancy, moment_distance
from fishr.space import Distribution, LogUniform


@dataclass(frozen=True)
class CausIRLConfig(PenalizedConfig):
    """Hyperparameters of CausIRL; the penalty acts from the first step."""

    penalty_weight: float = 1.0
    switch_on: int | float = 0

    def least_batch_size(self) -> int:
        return 2  # one sample cannot be cut in two

    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        return super().space(kind) | {"penalty_weight": LogUniform(0.1, 10.0)}


class _CausIRL(PenalizedAlgorithm):
    reference = Reference(
        "Chevalley, Bunne, Krause, Bauer",
        "Invariant Causal Mechanisms through Distribution Matching",
        2022,
        arxiv="2206.11646",
    )
    min_domains = 2
    Config = CausIRLConfig
    config: CausIRLConfig
    distance: Callable[[Tensor, Tensor], Tensor]

    def risk_and_penalty(self, features: Tensor, batch: DomainBatch) -> tuple[Tensor, Tensor]:
        risk = self.domain_risks(self.logits(features), batch).mean()
        cuts = [int(torch.randint(size, ())) for size in batch.sizes]
        parts = [part.tensor_split([cut]) for part, cut in zip(batch.split(features), cuts, strict=True)]
        first, second = (torch.cat(sample) for sample in zip(*parts, strict=True))
        if min(len(first), len(second)) < 2:
            return risk, features[:0].sum(dtype=risk.dtype)  # 0, with a gradient of 0
        return risk, self.distance(first, second)


class CausIRLCORAL(_CausIRL):
    """Equal means and covariances of the features under two random mixtures of the domains.

    objective = 1/|E| Σ_e R_e + λ · d(first parts, second parts)

    The batch of each domain is cut before its k-th sample, k uniform in 1, ..., n_e at every step. The first parts of
    all domains are one sample, the second parts the other: two samples that differ in the shares of the domains, which
    is an intervention on the domain; features that it leaves alone are those of the causal mechanism. d is the distance
    of means and covariances (:func:`fishr.functional.alignment.moment_distance`). Where one sample has fewer than two
    members, the penalty of the step is 0.
    """

    title = "CausIRL with CORAL"
    distance = staticmethod(moment_distance)


class CausIRLMMD(_CausIRL):
    """Equal distributions of the features under two random mixtures of the domains, compared by a kernel.

    objective = 1/|E| Σ_e R_e + λ · MMD²(first parts, second parts)

    As :class:`CausIRLCORAL`, with the maximum mean discrepancy
    (:func:`fishr.functional.alignment.maximum_mean_discrepancy`) for the distance d.
    """

    title = "CausIRL with MMD"
    distance = staticmethod(maximum_mean_discrepancy)
