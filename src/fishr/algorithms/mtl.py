"""Marginal transfer learning."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fishr.algorithms.base import Algorithm, AlgorithmConfig, Losses, Reference
from fishr.data.base import DomainBatch, Kind
from fishr.errors import ConfigError
from fishr.models.batch_context import MeanEmbedding
from fishr.models.build import ModelConfig
from fishr.space import Choice, Distribution


@dataclass(frozen=True)
class MTLConfig(AlgorithmConfig):
    """Hyperparameters of MTL.

    Attributes:
        update_weight: Weight a of the batch's mean in the moving average of its domain; 1 forgets all before.
    """

    update_weight: float = 0.99

    def problems(self) -> list[str]:
        problems = super().problems()
        if not 0 < self.update_weight <= 1:
            problems.append(f"update_weight must lie in (0, 1], got {self.update_weight}")
        return problems

    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        return super().space(kind) | {"update_weight": Choice((0.5, 0.9, 0.99, 1.0))}


class MTL(Algorithm):
    """Let the head adapt to a domain: beside a sample's features it sees their mean over the domain.

    objective = 1/n Σ_i ℓ(head(h_i ⊕ μ_e), y_i), μ_e ← a · mean of the features of domain e + (1 − a) · μ_e before

    for sample i of domain e; ⊕ joins vectors, a is the update weight. μ_e stands for the domain's distribution of
    inputs. It is zero before the first step; what it was before a step is a constant there, so the gradient reaches the
    featurizer through h_i and the mean over this batch.

    At test the μ_e of training are not used, and the prediction depends on the batch: the mean is that of the samples
    at hand, which are taken to come from one domain. A sample alone gets its own features for the mean, which is not
    what the head was trained on: predict many samples of a domain together.
    """

    title = "MTL"
    reference = Reference(
        "Blanchard, Deshmukh, Dogan, Lee, Scott",
        "Domain Generalization by Marginal Transfer Learning",
        2021,
        venue="JMLR",
        arxiv="1711.07910",
    )
    for_ranks = False
    Config = MTLConfig
    config: MTLConfig
    featurizer: MeanEmbedding
    embeddings: Tensor

    @classmethod
    def model_config(cls, model: ModelConfig) -> ModelConfig:
        options = {"featurizer": model.featurizer, "options": model.options}
        return replace(model, featurizer="mean-embedding", options=options)

    def setup(self) -> None:
        if not isinstance(self.featurizer, MeanEmbedding):
            raise ConfigError(f"MTL needs a MeanEmbedding as featurizer, got a {type(self.featurizer).__name__}")
        self.register_buffer("embeddings", torch.zeros(self.num_domains, self.featurizer.num_features // 2))

    def losses(self, batch: DomainBatch, step: int) -> Losses:
        with self.autocast():  # not self.features, whose mean would be over all domains
            inner = self.featurizer.inner(batch.inputs)
        features = self.dropped(inner.to(self.classifier.weight.dtype))
        means = torch.stack([part.mean(0) for part in batch.split(features)])
        embeddings = torch.lerp(self.embeddings, means, self.config.update_weight)
        self.embeddings.copy_(embeddings.detach())
        joined = [MeanEmbedding.join(*pair) for pair in zip(batch.split(features), embeddings, strict=True)]
        risk = self.sample_losses(self.logits(torch.cat(joined)), batch.targets).mean()
        return Losses(risk + self.l2_term(), {"risk": risk})
