"""Domain-adversarial training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from fishr.algorithms.adam import FusedAdam
from fishr.algorithms.base import Algorithm, AlgorithmConfig, Losses, Reference
from fishr.data.base import DomainBatch, Kind
from fishr.space import Choice, Distribution, LogUniform


@dataclass(frozen=True)
class DANNConfig(AlgorithmConfig):
    """Hyperparameters of domain-adversarial training; ``lr`` and ``weight_decay`` are those of featurizer and head.

    Attributes:
        adversary_weight: λ, the weight of the discriminator's loss in that of featurizer and head.
        discriminator_steps: Steps that train the discriminator for each that trains featurizer and head.
        discriminator_lr: Its learning rate; null for ``lr``.
        discriminator_weight_decay: L2 term in its gradient.
        discriminator_width: Units of each hidden layer.
        discriminator_depth: Its linear layers.
        discriminator_dropout: Probability that a hidden unit is dropped.
        gradient_penalty: w, the weight of the squared gradient of the cross-entropy with respect to the features.
        beta1: β₁ of Adam, for both; β₂ is 0.9.
    """

    adversary_weight: float = 1.0
    discriminator_steps: int = 1
    discriminator_lr: float | None = None
    discriminator_weight_decay: float = 0.0
    discriminator_width: int = 256
    discriminator_depth: int = 3
    discriminator_dropout: float = 0.0
    gradient_penalty: float = 0.0
    beta1: float = 0.5

    def problems(self) -> list[str]:
        problems = super().problems() + [
            f"{name} must be at least {least}, got {getattr(self, name)}"
            for name, least in (
                ("adversary_weight", 0),
                ("discriminator_steps", 1),
                ("discriminator_weight_decay", 0),
                ("discriminator_width", 1),
                ("discriminator_depth", 1),
                ("gradient_penalty", 0),
            )
            if getattr(self, name) < least
        ]
        if self.discriminator_lr is not None and self.discriminator_lr <= 0:
            problems.append(f"discriminator_lr must be above 0, or null for lr, got {self.discriminator_lr}")
        problems += [
            f"{name} must lie in [0, 1), got {getattr(self, name)}"
            for name in ("discriminator_dropout", "beta1")
            if not 0 <= getattr(self, name) < 1
        ]
        return problems

    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        shared = super().space(kind)
        return shared | {
            "adversary_weight": LogUniform(1e-2, 1e2),
            "discriminator_steps": LogUniform(2**0, 2**3, integer=True),
            "discriminator_lr": shared["lr"],
            "discriminator_weight_decay": LogUniform(1e-6, 1e-2),
            "discriminator_width": LogUniform(2**6, 2**10, integer=True),
            "discriminator_depth": Choice((3, 4, 5)),
            "discriminator_dropout": Choice((0.0, 0.1, 0.5)),
            "gradient_penalty": LogUniform(1e-2, 1e1),
            "beta1": Choice((0.0, 0.5)),
        }


class DANN(Algorithm):
    """Features from which a discriminator cannot tell the domain.

    objective = 1/n Σ_i ℓ_i − λ D of featurizer and head, and D of the discriminator, in turn

    D = 1/n Σ_i c_i + w/n Σ_i ‖∂(Σ_j c_j)/∂h_i‖², with c_i the cross-entropy of the discriminator's guess of the domain
    of sample i, λ the adversary weight and w that of the gradient penalty; both terms are in −λ D. Features that are
    alike in all domains may be alike in a new one.

    Step t = 1, 2, ... trains the discriminator where t mod (1 + s) < s, with s its steps for each one of featurizer and
    head. The paper trains both at once, by reversing the gradient; taking turns is DomainBed's way.
    """

    title = "DANN"
    reference = Reference(
        "Ganin and others", "Domain-Adversarial Training of Neural Networks", 2016, venue="JMLR", arxiv="1505.07818"
    )
    min_domains = 2
    Config: ClassVar[type[AlgorithmConfig]] = DANNConfig
    config: DANNConfig

    def setup(self) -> None:
        layers: list[nn.Module] = []
        num_inputs = self.classifier.in_features
        for _ in range(self.config.discriminator_depth - 1):
            layers += [nn.Linear(num_inputs, self.config.discriminator_width), nn.ReLU()]
            layers.append(nn.Dropout(self.config.discriminator_dropout))
            num_inputs = self.config.discriminator_width
        self.discriminator = nn.Sequential(*layers, nn.Linear(num_inputs, self.num_domains))

    def discriminator_parameters(self) -> list[nn.Parameter]:
        """Weights that the discriminator's steps train."""
        return list(self.discriminator.parameters())

    def configure_optimizers(self) -> dict[str, Optimizer]:
        betas = (self.config.beta1, 0.9)
        lr = self.config.lr if self.config.discriminator_lr is None else self.config.discriminator_lr
        decay = self.config.discriminator_weight_decay
        return {
            "main": FusedAdam(self.network_parameters, self.config.lr, betas, weight_decay=self.config.weight_decay),
            "discriminator": FusedAdam(self.discriminator_parameters(), lr, betas, weight_decay=decay),
        }

    def training_step(self, batch: DomainBatch, step: int, optimizers: Mapping[str, Optimizer]) -> Losses:
        turns = self.config.discriminator_steps
        trains_discriminator = (step + 1) % (1 + turns) < turns
        with torch.set_grad_enabled(not trains_discriminator):
            features = self.features(batch).to(self.classifier.weight.dtype)
            risk = self.sample_losses(self.logits(features), batch.targets).mean()
        if not features.requires_grad:  # the gradient penalty is that with respect to them
            features = features.detach().requires_grad_()
        discriminator_loss = self.discriminator_loss(features, batch)
        if trains_discriminator:
            total, optimizer = discriminator_loss, optimizers["discriminator"]
        else:
            total = risk + self.l2_term() - self.config.adversary_weight * discriminator_loss
            optimizer = optimizers["main"]
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return Losses(total, {"risk": risk, "discriminator_loss": discriminator_loss})

    def discriminator_loss(self, features: Tensor, batch: DomainBatch) -> Tensor:
        """D of features ``[sample, feature]``."""
        inputs = self.discriminator_input(features, batch.targets)
        losses = F.cross_entropy(self.discriminator(inputs), batch.domains, reduction="none")
        total = (losses * self.sample_weights(batch.targets)).sum()
        if self.config.gradient_penalty > 0:
            (slopes,) = torch.autograd.grad(losses.sum(), inputs, create_graph=True)
            total = total + self.config.gradient_penalty * slopes.square().sum(1).mean()
        return total

    def discriminator_input(self, features: Tensor, targets: Tensor) -> Tensor:
        """What the discriminator sees, ``[sample, feature]``; CDANN joins the class."""
        return features

    def sample_weights(self, targets: Tensor) -> Tensor:
        """Weight of each sample in D, ``[sample]``; CDANN balances the classes."""
        return torch.full(targets.shape[:1], 1 / len(targets), device=targets.device)
