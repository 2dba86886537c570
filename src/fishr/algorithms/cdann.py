"""Conditional domain-adversarial training."""

import torch
from torch import Tensor, nn

from fishr.algorithms.base import Reference
from fishr.algorithms.dann import DANN


class CDANN(DANN):
    """Features from which a discriminator that knows the class cannot tell the domain.

    As DANN, but the discriminator sees h_i + u_y, the features plus an embedding of the sample's class, and its
    cross-entropy is Σ_i 1 / (n_y · C) per sample of class y, n_y the samples of that class in the batch and C the
    largest label in it plus one.

    u is trained with the discriminator. The weights make each class count as much, however frequent: class-conditional
    distributions are aligned, and domains may differ in how frequent the classes are.
    """

    title = "CDANN"
    reference = Reference(
        "Li, Tian, Gong, Liu, Liu, Zhang, Tao",
        "Deep Domain Generalization via Conditional Invariant Adversarial Networks",
        2018,
        venue="ECCV",
    )

    def setup(self) -> None:
        super().setup()
        self.class_embeddings = nn.Embedding(max(2, self.classifier.out_features), self.classifier.in_features)

    def adversary(self) -> list[nn.Parameter]:
        return [*super().adversary(), *self.class_embeddings.parameters()]

    def discriminator_input(self, features: Tensor, targets: Tensor) -> Tensor:
        embedded: Tensor = self.class_embeddings(targets)
        return features + embedded

    def sample_weights(self, targets: Tensor) -> Tensor:
        counts = torch.bincount(targets)
        return 1 / (counts[targets] * len(counts))
