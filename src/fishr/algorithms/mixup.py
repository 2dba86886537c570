"""Mixup between domains."""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch.distributions import Beta

from fishr.algorithms.base import Algorithm, AlgorithmConfig, Losses, Reference
from fishr.data.base import DomainBatch, Kind
from fishr.space import Distribution, LogUniform


@dataclass(frozen=True)
class MixupConfig(AlgorithmConfig):
    """Hyperparameters of Mixup.

    Attributes:
        alpha: Both parameters of the Beta distribution of the mixing share: near 0 almost all of one sample, 1 uniform,
            large always half and half.
    """

    alpha: float = 0.2

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.alpha <= 0:
            problems.append(f"alpha must be above 0, got {self.alpha}")
        return problems

    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        return super().space(kind) | {"alpha": LogUniform(0.1, 10.0)}


class Mixup(Algorithm):
    """Learn from mixtures of samples of two domains.

    objective = mean over pairs (a, b) of 1/n Σ_i [λ ℓ(f(x_i), y_ai) + (1 − λ) ℓ(f(x_i), y_bi)]

    with x_i = λ x_ai + (1 − λ) x_bi and λ ~ Beta(α, α), one λ for each pair. The domains are put in a random order at
    every step, and each is paired with the next, the last with the first. Of domains with batches of unequal sizes
    the first n = min(n_a, n_b) samples are mixed. All mixtures go through the network as one batch; it sees no sample
    as it is.
    """

    title = "Mixup"
    reference = Reference(
        "Yan, Song, Li, Zou, Ren",
        "Improve Unsupervised Domain Adaptation with Mixup Training",
        2020,
        arxiv="2001.00677",
    )
    min_domains = 2
    for_ranks = False
    Config = MixupConfig
    config: MixupConfig

    def losses(self, batch: DomainBatch, step: int) -> Losses:
        samples, labels = batch.split(batch.inputs), batch.split(batch.targets)
        mixing = Beta(self.config.alpha, self.config.alpha)
        order = torch.randperm(len(samples)).tolist()
        inputs, first, second, drawn = [], [], [], []
        for a, b in pairwise([*order, order[0]]):
            n = min(batch.sizes[a], batch.sizes[b])
            share = mixing.sample().item()
            inputs.append(share * samples[a][:n] + (1 - share) * samples[b][:n])
            first.append(labels[a][:n])
            second.append(labels[b][:n])
            drawn.append(share)
        mixed = DomainBatch.of(inputs, first)
        logits = self(mixed.inputs)
        shares = torch.stack([logits.new_full((), share) for share in drawn])  # filled on the device, not copied there
        risks = shares * self.domain_risks(logits, mixed)
        risks = risks + (1 - shares) * self.domain_risks(logits, replace(mixed, targets=torch.cat(second)))
        risk = risks.mean()
        return Losses(risk + self.l2_term(), {"risk": risk})
