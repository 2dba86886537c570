"""Representation self-challenging."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fishr.algorithms.base import Algorithm, AlgorithmConfig, Losses, Reference
from fishr.data.base import DomainBatch, Kind
from fishr.space import Distribution, Uniform


@dataclass(frozen=True)
class RSCConfig(AlgorithmConfig):
    """Hyperparameters of RSC.

    Attributes:
        feature_drop: Share f of a sample's features that may be muted.
        batch_drop: Share b of the samples whose features are muted.
    """

    feature_drop: float = 1 / 3
    batch_drop: float = 1 / 3

    def problems(self) -> list[str]:
        return super().problems() + [
            f"{name} must lie in [0, 1], got {getattr(self, name)}"
            for name in ("feature_drop", "batch_drop")
            if not 0 <= getattr(self, name) <= 1
        ]

    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        return super().space(kind) | {"feature_drop": Uniform(0.0, 0.5), "batch_drop": Uniform(0.0, 0.5)}


class RSC(Algorithm):
    """Mute the features that the prediction rests on most, so that others are learned too.

    objective = 1/n Σ_i ℓ(head(m_i ⊙ h_i), y_i), with h_i the features of sample i and m_i a mask of 0 and 1

    A feature is muted where the gradient of the true class's logit with respect to it is at or above the (1 − f)
    quantile of its sample; but only in samples whose probability of the true class falls by that at or above the
    (1 − b) quantile of the batch. All other m are 1. Domains play no part.
    """

    title = "RSC"
    reference = Reference(
        "Huang, Wang, Xing, Huang",
        "Self-Challenging Improves Cross-Domain Generalization",
        2020,
        venue="ECCV",
        arxiv="2007.02454",
    )
    for_classes = True
    Config = RSCConfig
    config: RSCConfig

    def losses(self, batch: DomainBatch, step: int) -> Losses:
        features = self.features(batch).to(self.classifier.weight.dtype)
        muted = features * self.mask(features.detach(), batch.targets)
        risk = self.sample_losses(self.logits(muted), batch.targets).mean()
        return Losses(risk + self.l2_term(), {"risk": risk})

    def mask(self, features: Tensor, targets: Tensor) -> Tensor:
        """m, ``[sample, feature]``."""
        with torch.enable_grad():
            features = features.detach().requires_grad_()
            (slopes,) = torch.autograd.grad(_of_true_class(self.logits(features), targets).sum(), features)
        with torch.no_grad():
            kept = ~_largest(slopes, self.config.feature_drop)
            before, after = (self._true_probability(inputs, targets) for inputs in (features, features * kept))
            spared = ~_largest(before - after, self.config.batch_drop)
            return (kept | spared.unsqueeze(1)).to(features.dtype)

    def _true_probability(self, features: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(features)
        if logits.shape[1] == 1:
            return torch.sigmoid(_of_true_class(logits, targets))
        return _of_true_class(torch.softmax(logits, dim=1), targets)


def _largest(values: Tensor, share: float) -> Tensor:
    """Which values lie at or above the (1 − share) quantile along the last dimension.

    Taken from the order of the values, because an interpolated quantile that falls on a value is rounded either way.
    """
    rank = math.ceil(round((1 - share) * (values.shape[-1] - 1), 9))
    return values >= values.kthvalue(rank + 1, dim=-1, keepdim=True).values


def _of_true_class(values: Tensor, targets: Tensor) -> Tensor:
    """The entry of each sample's class, ``[sample]``; of a single logit, its value towards that class."""
    if values.shape[1] == 1:
        return torch.where(targets > 0, values[:, 0], -values[:, 0])
    return values.gather(1, targets.unsqueeze(1)).squeeze(1)
