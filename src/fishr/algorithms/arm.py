"""Adaptive risk minimization with a context network."""

from dataclasses import dataclass, replace
from typing import Self

import torch

from fishr.algorithms.base import Algorithm, AlgorithmConfig, Losses, Reference
from fishr.data.base import DomainBatch, Kind
from fishr.errors import ConfigError
from fishr.models.batch_context import ContextFeaturizer
from fishr.models.build import ModelConfig
from fishr.space import Choice, Distribution


@dataclass(frozen=True)
class ARMConfig(AlgorithmConfig):
    """Hyperparameters of ARM; on images batches are of 8."""

    def least_batch_size(self) -> int:
        return 2  # the context network normalises over the batch

    @classmethod
    def default(cls, kind: Kind) -> Self:
        defaults = super().default(kind)
        return defaults.updated({"batch_size": 8}) if kind == "images" else defaults

    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        shared = super().space(kind)
        return shared | {"batch_size": Choice((8,))} if kind == "images" else shared


class ARM(Algorithm):
    """Learn to adapt to a domain from unlabelled samples of it.

    objective = 1/n Σ_i ℓ(f(x_i ⊕ c_e), y_i), c_e = mean over the batch's samples of domain e of the context network

    x_i ⊕ c_e joins the input of sample i of domain e and its domain's context: one more channel of an image
    (:class:`fishr.models.batch_context.ContextFeaturizer`). Domains go through the network one by one. Network and
    context network are trained together, on what they do after having adapted (the paper's ARM-CML).

    The prediction depends on the batch: the context is that of the samples at hand, which are taken to come from one
    domain. For a sample alone it is that sample's own.
    """

    title = "ARM"
    reference = Reference(
        "Zhang, Marklund, Dhawan, Gupta, Levine, Finn",
        "Adaptive Risk Minimization: Learning to Adapt to Domain Shift",
        2021,
        venue="NeurIPS",
        arxiv="2007.02931",
    )
    for_ranks = False
    Config = ARMConfig
    featurizer: ContextFeaturizer

    @classmethod
    def model_config(cls, model: ModelConfig) -> ModelConfig:
        options = {"featurizer": model.featurizer, "options": model.options}
        return replace(model, featurizer="context", options=options)

    def setup(self) -> None:
        if not isinstance(self.featurizer, ContextFeaturizer):
            raise ConfigError(f"ARM needs a ContextFeaturizer as featurizer, got a {type(self.featurizer).__name__}")

    def losses(self, batch: DomainBatch, step: int) -> Losses:
        logits = torch.cat([self(inputs) for inputs in batch.split(batch.inputs)])
        risk = self.sample_losses(logits, batch.targets).mean()
        return Losses(risk + self.l2_term(), {"risk": risk})
