"""Conditional domain-adversarial training."""

import torch
from torch import Tensor, nn

from fishr.algorithms.base import Reference
from fishr.algorithms.dann import DANN


class CDANN(DANN):
    """Features from which a discriminator that knows the class cannot tell the domain.

    objective = 1/n Σ_i ℓ_i − λ D of featurizer and head, and D of the discriminator, in turn, as in DANN

    but the discriminator sees h_i + u_y, the features plus an embedding u of the sample's class y, trained with the
    discriminator, and the first term of D is Σ_i c_i / (n_y C), with n_y the samples of class y in the batch and C the
    largest label in it plus one. The weights make each class count as much, however frequent: class-conditional
    distributions are aligned, and domains may differ in how frequent the classes are.
    """

    title = "CDANN"
    reference = Reference(
        "Li, Tian, Gong, Liu, Liu, Zhang, Tao",
        "Deep Domain Generalization via Conditional Invariant Adversarial Networks",
        2018,
        venue="ECCV",
    )
    for_classes = True

    def setup(self) -> None:
        super().setup()
        self.class_embeddings = nn.Embedding(max(2, self.classifier.out_features), self.classifier.in_features)

    def discriminator_parameters(self) -> list[nn.Parameter]:
        return [*super().discriminator_parameters(), *self.class_embeddings.parameters()]

    def discriminator_input(self, features: Tensor, targets: Tensor) -> Tensor:
        embedded: Tensor = self.class_embeddings(targets)
        return features + embedded

    def sample_weights(self, targets: Tensor) -> Tensor:
        # Not bincount, whose length would make an accelerator's host wait.
        counts = targets.new_zeros(self.class_embeddings.num_embeddings)
        counts = counts.scatter_add(0, targets, torch.ones_like(targets))
        return 1 / (counts[targets] * (targets.max() + 1))
