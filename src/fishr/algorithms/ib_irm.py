"""The information bottleneck with IRM."""

from dataclasses import dataclass

from torch import Tensor

from fishr.algorithms.base import Losses
from fishr.algorithms.ib_erm import IBERM, feature_variance
from fishr.algorithms.irm import IRM, IRMConfig
from fishr.algorithms.penalized import SWITCH_ON, step_of, warn_if_never
from fishr.data.base import DomainBatch, Kind
from fishr.nn.gradient_balance import GradientBalance
from fishr.space import Distribution, LogUniform


@dataclass(frozen=True)
class IBIRMConfig(IRMConfig):
    """Hyperparameters of IB-IRM: IRM's, and those of the bottleneck.

    Attributes:
        ib_weight: Weight λ_ib of the variance of the features from ``ib_switch_on`` on; before, it is 0. With
            ``strength`` it follows the gradients, as the weight of IRM's penalty does.
        ib_switch_on: First step with that weight: a whole number is a step, a decimal a share of the run.
    """

    ib_weight: float = 100.0
    ib_switch_on: int | float = 0.1

    def least_batch_size(self) -> int:
        return 2  # one sample has no variance

    def problems(self) -> list[str]:
        problems = super().problems() + [
            f"{name} must be at least 0, got {getattr(self, name)}"
            for name in ("ib_weight", "ib_switch_on")
            if getattr(self, name) < 0
        ]
        if self.rescale:
            problems.append("rescale divides by the one weight of a penalty, and IB-IRM has two: leave it false")
        return problems

    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        return super().space(kind) | {
            "ib_weight": LogUniform(1e-1, 1e5),
            "ib_switch_on": SWITCH_ON,
        }


class IBIRM(IRM):
    """A classifier that is optimal in every domain, on features that vary as little as possible.

    objective = IRM's + λ_ib · 1/|E| Σ_e mean over features of their unbiased variance in domain e

    The optimizer's state is forgotten at the switch-on step of either penalty.
    """

    title = "IB-IRM"
    reference = IBERM.reference
    Config = IBIRMConfig
    config: IBIRMConfig

    def setup(self) -> None:
        super().setup()
        self.ib_switch_on_step = max(step_of("ib_switch_on", self.config.ib_switch_on, self.steps), self.ramp)
        self.reset_steps.add(self.ib_switch_on_step)
        self.switch_on_step = max(self.penalty_from, self.ib_switch_on_step)
        warn_if_never("the bottleneck", "ib_switch_on", self.config.ib_switch_on, self.ib_switch_on_step, self.steps)
        self.ib_balance = None if self.config.strength is None else GradientBalance(self.config.strength)

    def losses_of(self, features: Tensor, batch: DomainBatch, step: int) -> Losses:
        losses = super().losses_of(features, batch, step)
        bottleneck = feature_variance(features.to(self.classifier.weight.dtype), batch)
        if self.ib_balance and step >= self.ib_switch_on_step - self.ramp:
            self.ib_balance.observe(features, losses.terms["risk"], bottleneck)
        total = losses.total + self.ib_weight(step) * bottleneck
        return Losses(total, losses.terms | {"bottleneck": bottleneck})

    def ib_weight(self, step: int) -> Tensor | float:
        """The weight of the bottleneck at a step."""
        if step < self.ib_switch_on_step:
            return 0.0
        if self.ib_balance is None:
            return self.config.ib_weight
        return self.ramped(step, self.ib_switch_on_step) * self.ib_balance.weight()
