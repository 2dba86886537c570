"""Style-agnostic networks."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from fishr.algorithms.adam import FusedAdam
from fishr.algorithms.base import Algorithm, AlgorithmConfig, Losses, Reference
from fishr.data.base import DomainBatch, Kind
from fishr.space import Distribution, LogUniform

EPSILON = 1e-5
"""Added to variances, so that a sample of equal features can be normalised."""


@dataclass(frozen=True)
class SagNetConfig(AlgorithmConfig):
    """Hyperparameters of SagNet.

    Attributes:
        adversary_weight: Weight of the loss by which the featurizer makes the style head's prediction uniform.
    """

    adversary_weight: float = 0.1

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.adversary_weight < 0:
            problems.append(f"adversary_weight must be at least 0, got {self.adversary_weight}")
        return problems

    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        return super().space(kind) | {"adversary_weight": LogUniform(1e-2, 1e1)}


class SagNet(Algorithm):
    """Predict from content, and make style, in which domains differ most, say nothing about the class.

    objectives of three updates at every step:
    1. featurizer and head: 1/n Σ_i ℓ(head(σ̂_i c_i + μ̂_i), y_i), with style randomised;
    2. style head: 1/n Σ_i ℓ(style head(σ_i c_j + μ_i), y_i), with content randomised;
    3. featurizer: λ/n Σ_i H(uniform, prediction of the style head as in 2)

    Style is the mean μ_i and the standard deviation σ_i over the features h_i of a sample, content what is left, c_i =
    (h_i − μ_i) / σ_i. Sample j is the partner of i in a random permutation of the batch, in which a sample may meet
    itself (one alone always does); domain labels play no part. Randomised style is μ̂_i = α_i μ_i + (1 − α_i) μ_j, and
    σ̂_i likewise, with α_i ~ U(0, 1); randomised content c_j is a constant, so the adversary reaches the featurizer
    through style alone. λ is the adversary weight, and both updates of the featurizer share one Adam. H is the
    cross-entropy against the uniform distribution; the two classes of a single logit z have the probabilities
    sigmoid(z) and sigmoid(−z).

    The published method exchanges the statistics of feature maps within the network and has a convolutional style
    branch; here, as in DomainBed, statistics are those of feature vectors, and the style head is linear and not used
    after training. Standard deviations are interpolated, as published; DomainBed interpolates variances. The features
    are computed anew after the first update, and each update has a permutation of its own.
    """

    title = "SagNet"
    reference = Reference(
        "Nam, Lee, Park, Yoon, Yoo",
        "Reducing Domain Gap by Reducing Style Bias",
        2021,
        venue="CVPR",
        arxiv="1910.11645",
    )
    for_classes = True
    Config = SagNetConfig
    config: SagNetConfig

    def setup(self) -> None:
        head = self.classifier
        self.style_head = nn.Linear(head.in_features, head.out_features).to(head.weight)

    def configure_optimizers(self) -> dict[str, Optimizer]:
        parts = {"featurizer": self.featurizer, "classifier": self.classifier, "style": self.style_head}
        # Groups, because a plain list must not be empty, and a featurizer may have no weights.
        return {
            name: FusedAdam(
                [{"params": list(part.parameters())}], self.config.lr, weight_decay=self.config.weight_decay
            )
            for name, part in parts.items()
        }

    def training_step(self, batch: DomainBatch, step: int, optimizers: Mapping[str, Optimizer]) -> Losses:
        restyled = randomize_style(self.wide_features(batch))
        risk = self.sample_losses(self.logits(restyled), batch.targets).mean()
        total = risk + self.l2_term()
        _update(total, optimizers["featurizer"], optimizers["classifier"])

        features = self.wide_features(batch)
        refilled = randomize_content(features.detach())
        style_loss = self.sample_losses(self.style_head(refilled), batch.targets).mean()
        _update(style_loss, optimizers["style"])

        adversarial_loss = cross_entropy_to_uniform(self.style_head(randomize_content(features))).mean()
        adversarial = self.config.adversary_weight * adversarial_loss
        _update(adversarial, optimizers["featurizer"])
        return Losses(
            total + adversarial, {"risk": risk, "style_loss": style_loss, "adversarial_loss": adversarial_loss}
        )

    def wide_features(self, batch: DomainBatch) -> Tensor:
        """Features ``[sample, feature]`` in the precision of the heads."""
        return self.features(batch).to(self.classifier.weight.dtype)


def randomize_style(features: Tensor) -> Tensor:
    """The content of each sample in a style between its own and another's: σ̂_i c_i + μ̂_i, ``[sample, feature]``."""
    content, mean, deviation = _content_and_style(features)
    partners = torch.randperm(len(features), device=features.device)
    share = torch.rand(len(features), 1, dtype=features.dtype, device=features.device)
    return content * torch.lerp(deviation[partners], deviation, share) + torch.lerp(mean[partners], mean, share)


def randomize_content(features: Tensor) -> Tensor:
    """The content of another sample, a constant, in the style of each: σ_i c_j + μ_i, ``[sample, feature]``."""
    content, mean, deviation = _content_and_style(features)
    partners = torch.randperm(len(features), device=features.device)
    return content[partners].detach() * deviation + mean


def cross_entropy_to_uniform(logits: Tensor) -> Tensor:
    """Cross-entropy of the predicted distribution against the uniform one, ``[sample]``; least where both agree."""
    if logits.shape[1] == 1:
        logits = F.pad(logits, (1, 0))  # softmax of (0, z) is (sigmoid(−z), sigmoid(z))
    return -logits.log_softmax(1).mean(1)


def _content_and_style(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Content ``[sample, feature]``, mean and standard deviation ``[sample, 1]``."""
    # The biased variance: that of a single feature is 0, the unbiased one not a number.
    variance, mean = torch.var_mean(features, dim=1, correction=0, keepdim=True)
    deviation = (variance + EPSILON).sqrt()
    return (features - mean) / deviation, mean, deviation


def _update(loss: Tensor, *optimizers: Optimizer) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    for optimizer in optimizers:
        optimizer.step()
