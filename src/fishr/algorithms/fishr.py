"""Fishr: invariant gradient variances."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from fishr.algorithms.base import Losses, Reference
from fishr.algorithms.penalized import PenalizedAlgorithm, PenalizedConfig
from fishr.data.base import DomainBatch, Kind
from fishr.functional.penalty import Reduction
from fishr.nn.network_penalty import NetworkFishrPenalty
from fishr.nn.penalty import FishrPenalty, Variant
from fishr.space import Distribution, LogUniform, Uniform


@dataclass(frozen=True)
class FishrConfig(PenalizedConfig):
    """Hyperparameters of Fishr; more on them: :class:`fishr.nn.FishrPenalty`, :class:`fishr.nn.NetworkFishrPenalty`.

    Attributes:
        ema: Decay γ of the moving average; null for the variant's own.
        reduction: ``"mean"`` (DomainBed) or ``"sum"`` (the Colored MNIST script); null for the variant's own.
        variant: ``"variance"``, ``"second_moment"`` or ``"covariance"``.
        layers: Whose gradients are compared: ``"classifier"`` (published), ``"featurizer"`` or ``"all"``.
    """

    penalty_weight: float = 1000.0
    ema: float | None = None
    reduction: Reduction | None = None
    variant: Variant = "variance"
    layers: Literal["classifier", "featurizer", "all"] = "classifier"

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.ema is not None and not 0 <= self.ema < 1:
            problems.append(f"ema must lie in [0, 1), got {self.ema}")
        if self.variant == "covariance" and (self.ema or self.reduction == "mean"):
            problems.append("variant 'covariance' takes no moving average (ema) and only the reduction 'sum'")
        if self.variant == "covariance" and self.layers != "classifier":
            problems.append(f"variant 'covariance' is for the layers 'classifier' alone, got layers {self.layers!r}")
        return problems

    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        return super().space(kind) | {
            "penalty_weight": LogUniform(1e1, 1e4),
            "switch_on": Uniform(0.0, 1.0),
            "ema": Uniform(0.90, 0.99),
        }


class Fishr(PenalizedAlgorithm):
    """Equal variances of the per-sample gradients in all domains.

    objective = 1/n Σ_i ℓ_i + λ · 1/|E| Σ_e ‖v_e − v̄‖² (scaled as ``reduction`` says)

    with v_e the variance over the samples of domain e of the head's gradient, computed in closed form by
    :class:`fishr.nn.FishrPenalty`, v̄ the mean over domains. At a minimum the variance approximates, up to scale, the
    diagonal of the Hessian: equal variances make the domains' loss landscapes alike around the weights, so that a step
    which leaves one domain's loss low does not raise another's. The moving average runs from the first step, the
    penalty acts from the switch-on step.

    With other ``layers`` v_e is that of the featurizer's gradient, or of all weights'
    (:class:`fishr.nn.NetworkFishrPenalty`), for which a λ of the head's does not fit; a strength measures what acts by
    way of the features alone. It takes a second backward pass, a single device, and no batch norm but frozen.
    """

    title = "Fishr"
    reference = Reference(
        "Rame, Dancette, Cord",
        "Fishr: Invariant Gradient Variances for Out-of-Distribution Generalization",
        2022,
        venue="ICML",
        arxiv="2109.02934",
    )
    min_domains = 2
    Config = FishrConfig
    config: FishrConfig

    def setup(self) -> None:
        super().setup()
        config = self.config
        self.penalty: FishrPenalty | NetworkFishrPenalty
        if config.layers == "classifier":
            self.penalty = FishrPenalty(
                self.classifier,
                self.num_domains,
                loss=self.loss,
                ema=config.ema,
                reduction=config.reduction,
                variant=config.variant,
                over_ranks=False,
            )
        else:
            self.compiles = False
            layers = {"featurizer": self.featurizer} | (
                {"classifier": self.classifier} if config.layers == "all" else {}
            )
            self.penalty = NetworkFishrPenalty(
                nn.ModuleDict(layers),
                self.num_domains,
                loss=self.loss,
                ema=config.ema,
                reduction=config.reduction,
                variant=config.variant,
            )

    def losses(self, batch: DomainBatch, step: int) -> Losses:
        with self.penalty.watch() if isinstance(self.penalty, NetworkFishrPenalty) else nullcontext():
            return super().losses(batch, step)

    def risk_and_penalty(self, features: Tensor, batch: DomainBatch) -> tuple[Tensor, Tensor]:
        logits = self.logits(features)
        risk = self.sample_losses(logits, batch.targets).mean()
        if isinstance(self.penalty, NetworkFishrPenalty):
            return risk, self.penalty(logits, batch.targets, batch.sizes)
        return risk, self.penalty(features, logits, batch.targets, batch.sizes)
