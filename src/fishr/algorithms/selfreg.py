"""Self-supervised contrastive regularization."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Beta

from fishr.algorithms.base import Algorithm, Losses, Reference
from fishr.data.base import DomainBatch

FEATURE_WEIGHT = 0.3
MIXING = 0.5
"""Both parameters of the Beta distribution of λ."""


class SelfReg(Algorithm):
    """Draw samples of a class together, whatever their domains, by positive pairs alone.

    objective = R + min(R, 1) · [λ · d(z, z_p) + (1 − λ) · d(z, λ z_p + (1 − λ) z_q)], λ ~ Beta(0.5, 0.5)

    R is the mean loss over all samples; min(R, 1) is a constant in the gradient. p and q are independent random
    permutations of the batch within each class, over all domains: z_p are the outputs of partners of the same class
    (the individualised loss), and mixtures of two partners stand for perturbed domains (the heterogeneous one). The
    dissimilarity d is the mean squared difference of the logits, plus 0.3 times that of the features to the partners'
    features after a projection network, which is used in training only. One λ is drawn for each step, and has both
    roles, as in the published code.

    The projection is linear, batch norm, ReLU, linear, batch norm, ReLU, linear, batch norm, with hidden layers twice
    as wide as the features (of 2048 features as wide). A sample that is the only one of its class is its own partner; a
    batch of one sample is not projected, for want of statistics. Stochastic weight averaging and the curriculum of the
    paper are left out, as in DomainBed.
    """

    title = "SelfReg"
    reference = Reference(
        "Kim, Yoo, Park, Kim, Lee",
        "SelfReg: Self-supervised Contrastive Regularization for Domain Generalization",
        2021,
        venue="ICCV",
        arxiv="2104.09841",
    )
    for_classes = True

    def setup(self) -> None:
        width = self.classifier.in_features
        hidden = width if width == 2048 else 2 * width
        layers: list[nn.Module] = []
        for num_inputs in (width, hidden):
            layers += [nn.Linear(num_inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
        self.projection = nn.Sequential(*layers, nn.Linear(hidden, width), nn.BatchNorm1d(width))
        self.projection.to(self.classifier.weight)

    def losses(self, batch: DomainBatch, step: int) -> Losses:
        features = self.features(batch).to(self.classifier.weight.dtype)
        logits = self.logits(features)
        projected = self.projection(features) if len(features) > 1 else features
        risk = self.sample_losses(logits, batch.targets).mean()

        share = Beta(MIXING, MIXING).sample().item()
        p, q = same_class_partners(batch.targets), same_class_partners(batch.targets)

        def dissimilarity(other_logits: Tensor, other_features: Tensor) -> Tensor:
            return F.mse_loss(logits, other_logits) + FEATURE_WEIGHT * F.mse_loss(features, other_features)

        def mixed(outputs: Tensor) -> Tensor:
            return share * outputs[p] + (1 - share) * outputs[q]

        individual = dissimilarity(logits[p], projected[p])
        heterogeneous = dissimilarity(mixed(logits), mixed(projected))
        scale = risk.detach().clamp(max=1)
        total = risk + scale * (share * individual + (1 - share) * heterogeneous) + self.l2_term()
        return Losses(total, {"risk": risk, "individual": individual, "heterogeneous": heterogeneous})


def same_class_partners(targets: Tensor) -> Tensor:
    """A random permutation of samples that leaves the classes as they are, int64 ``[sample]``.

    >>> targets = torch.tensor([0, 1, 0, 1, 2])
    >>> targets[same_class_partners(targets)]
    tensor([0, 1, 0, 1, 2])
    """
    shuffled = torch.randperm(len(targets), device=targets.device)
    partners = torch.empty_like(shuffled)
    partners[targets.argsort(stable=True)] = shuffled[targets[shuffled].argsort(stable=True)]
    return partners
