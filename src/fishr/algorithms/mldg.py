"""Meta-learning domain generalization."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fishr.algorithms.base import Algorithm, AlgorithmConfig, Losses, Reference, gradients
from fishr.data.base import DomainBatch, Kind
from fishr.space import Choice, Distribution, LogUniform

ADAM_EPSILON = 1e-8


@dataclass(frozen=True)
class MLDGConfig(AlgorithmConfig):
    """Hyperparameters of MLDG.

    Attributes:
        beta: β, the weight of the meta-test risk.
        num_meta_test: Training domains that play the held-out domain at a step; at most all but one of them are taken.
    """

    beta: float = 1.0
    num_meta_test: int = 2

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.beta < 0:
            problems.append(f"beta must be at least 0, got {self.beta}")
        if self.num_meta_test < 1:
            problems.append(f"num_meta_test must be at least 1, got {self.num_meta_test}")
        return problems

    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        return super().space(kind) | {"beta": LogUniform(0.1, 10.0), "num_meta_test": Choice((1, 2))}


class MLDG(Algorithm):
    """Steps on some domains that lower the risk on others too (first-order).

    objective = 1/|E| Σ_(a, b) [R_a(w) + β R_b(w − Δ_a)], Δ_a = lr · g / (|g| + 10⁻⁸), g = ∇R_a(w) + weight_decay · w

    Δ_a is the first step that Adam would take on R_a from the weights w. It is a constant in the gradient, so that no
    second derivative is needed: that of the second risk is taken at the stepped weights and applied to w. The published
    method differentiates through a step of gradient descent; Adam's step and the first order are DomainBed's.

    At every step the domains are put in a random order. The last ``num_meta_test`` are the meta-test domains; the
    others are paired with them in turn, so there are as many pairs as meta-train domains, and where these are fewer,
    not every meta-test domain is used. As in DomainBed the sum is divided by the number |E| of all training domains.
    Each risk is the mean over the whole batch of its domain. Running statistics of batch-norm layers are updated at
    both weights.
    """

    title = "MLDG"
    reference = Reference(
        "Li, Yang, Song, Hospedales",
        "Learning to Generalize: Meta-Learning for Domain Generalization",
        2018,
        venue="AAAI",
        arxiv="1710.03463",
    )
    min_domains = 2
    compiles = False
    Config = MLDGConfig
    config: MLDGConfig

    def losses(self, batch: DomainBatch, step: int) -> Losses:
        parts, risk_of = batch.parts, _Risk(self)
        weights = {name: weight for name, weight in risk_of.named_parameters() if weight.requires_grad}
        risks, meta_risks = [], []
        for a, b in self.pairs():
            risks.append(risk_of(parts[a]))
            meta_risks.append(functional_call(risk_of, self.stepped(weights, risks[-1], batch), (parts[b],)))
        risk, meta_risk = torch.stack(risks), torch.stack(meta_risks)
        total = (risk + self.config.beta * meta_risk).sum() / self.num_domains + self.l2_term()
        return Losses(total, {"risk": risk.mean(), "meta_risk": meta_risk.mean()})

    def pairs(self) -> list[tuple[int, int]]:
        """Meta-train domains, each with its meta-test domain."""
        order = torch.randperm(self.num_domains).tolist()
        num_meta_train = self.num_domains - min(self.config.num_meta_test, self.num_domains - 1)
        return list(zip(order[:num_meta_train], cycle(order[num_meta_train:]), strict=False))

    def stepped(self, weights: Mapping[str, Tensor], risk: Tensor, batch: DomainBatch) -> dict[str, Tensor]:
        """Weights after Adam's first step on a risk; their derivative with respect to the weights before is 1."""
        slopes = gradients(risk, list(weights.values()), batch)
        after = {}
        for (name, weight), slope in zip(weights.items(), slopes, strict=True):
            slope = slope + self.config.weight_decay * weight.detach()
            after[name] = weight - self.config.lr * slope / (slope.abs() + ADAM_EPSILON)
        return after


class _Risk(nn.Module):
    """The mean loss of a batch as a module, for other weights than the algorithm's to be put into it."""

    def __init__(self, algorithm: Algorithm) -> None:
        super().__init__()
        self.algorithm = algorithm

    def forward(self, batch: DomainBatch) -> Tensor:
        algorithm = self.algorithm
        return algorithm.sample_losses(algorithm.logits(algorithm.features(batch)), batch.targets).mean()
