"""Algorithms that add a penalty to the risk, and the schedule of its weight."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor
from torch.optim import Optimizer

from fishr.algorithms.base import Algorithm, AlgorithmConfig, Losses
from fishr.data.base import DomainBatch, Kind
from fishr.errors import ConfigError
from fishr.nn.gradient_balance import GradientBalance
from fishr.space import LogUniform

logger = logging.getLogger(__name__)

RECOMMENDED_STRENGTH = 0.5

RAMP = 0.05
"""Share of a run over which gradients are measured before a penalty is switched on, and over which λ then grows."""

SWITCH_ON = LogUniform(1 / 5000, 10_000 / 5000)
"""DomainBed's search space of switch-on steps, 1 to 10,000, as a share of its 5,000."""

UNKNOWN_RAMP = 50
"""The same in steps, where the length of the run is not known."""


@dataclass(frozen=True)
class PenalizedConfig(AlgorithmConfig):
    """Hyperparameters of a penalty and its schedule.

    The weight of the penalty is ``weight_before`` until the switch-on step and ``penalty_weight`` from then on. The
    defaults are DomainBed's convention; the Colored MNIST script's is ``weight_before=1, rescale=True,
    reset_optimizer=False``.

    λ is not portable: how much it weighs depends on backbone, head and moving average. With ``strength`` it follows
    the gradients instead (:class:`fishr.nn.GradientBalance`), which are measured from :data:`RAMP` of the run before
    the switch-on step; from that step on λ is reached by a linear ramp of the same length. A switch-on step before
    there are measurements is put off.

    Attributes:
        penalty_weight: λ, the weight from the switch-on step on.
        strength: ρ, the norm of the penalty's gradient with respect to the features as a multiple of the risk's; where
            it is given, ``penalty_weight`` is not used.
        switch_on: First step with that weight: a whole number is a step, a decimal a share of the run.
        weight_before: The weight until then.
        rescale: Divide the whole loss by the weight where that is above 1.
        reset_optimizer: Forget the optimizer's state at the switch-on step.
    """

    penalty_weight: float = 1.0
    strength: float | None = None
    switch_on: int | float = 0.3
    weight_before: float = 0.0
    rescale: bool = False
    reset_optimizer: bool = True

    @classmethod
    def recommended(cls, kind: Kind) -> Self:
        return super().recommended(kind).updated({"strength": RECOMMENDED_STRENGTH, "weight_before": 0.0})

    def problems(self) -> list[str]:
        problems = super().problems() + [
            f"{name} must be at least 0, got {getattr(self, name)}"
            for name in ("penalty_weight", "weight_before", "switch_on")
            if getattr(self, name) < 0
        ]
        if self.strength is not None and self.strength <= 0:
            problems.append(f"strength must be above 0, or null for the given penalty_weight, got {self.strength}")
        if self.strength is not None and self.rescale:
            problems.append("rescale is for a large penalty_weight: give one, and strength null")
        return problems

    def switch_on_step(self, steps: int | None) -> int:
        """The switch-on step of a run of ``steps`` steps.

        Raises:
            ConfigError: ``switch_on`` is a share and the length of the run is not given.
        """
        return max(step_of("switch_on", self.switch_on, steps), self.ramp(steps))

    def ramp(self, steps: int | None) -> int:
        """Steps over which gradients are measured, and λ then grows; 0 where it is given."""
        if self.strength is None:
            return 0
        return UNKNOWN_RAMP if steps is None else math.ceil(RAMP * steps)


def step_of(name: str, value: int | float, steps: int | None) -> int:
    """The step that a hyperparameter means: a whole number is the step itself, a decimal a share of the run.

    Raises:
        ConfigError: it is a share and the length of the run is not given.
    """
    if isinstance(value, int):
        return value
    if steps is None:
        raise ConfigError(
            f"{name}={value} is a share of the run: give steps=, the length of the run, or a whole number, the step "
            "itself"
        )
    return math.floor(value * steps + 0.5)


def warn_if_never(what: str, name: str, value: int | float, step: int, steps: int | None) -> None:
    """Warn of a step that a run of ``steps`` steps does not reach."""
    if steps is not None and step >= steps:
        logger.warning("%s never switches on: %s=%s is step %d of a run of %d steps", what, name, value, step, steps)


class PenalizedAlgorithm(Algorithm):
    """risk + weight(step) · penalty; a subclass defines :meth:`risk_and_penalty`.

    Attributes:
        penalty_from: The first step at which the penalty has its weight.
    """

    Config: ClassVar[type[AlgorithmConfig]] = PenalizedConfig
    config: PenalizedConfig
    balance: GradientBalance | None
    reset_steps: set[int]

    def setup(self) -> None:
        self.penalty_from, self.ramp = self.config.switch_on_step(self.steps), self.config.ramp(self.steps)
        self.switch_on_step = self.penalty_from
        self.reset_steps = {self.penalty_from}
        self.balance = None if self.config.strength is None else GradientBalance(self.config.strength)
        warn_if_never("the penalty", "switch_on", self.config.switch_on, self.penalty_from, self.steps)

    def risk_and_penalty(self, features: Tensor, batch: DomainBatch) -> tuple[Tensor, Tensor]:
        """The risk to minimise and the penalty, unweighted, of a batch with these features ``[sample, feature]``."""
        raise NotImplementedError

    def losses(self, batch: DomainBatch, step: int) -> Losses:
        features = self.features(batch)
        if self.balance and not features.requires_grad:  # of a frozen featurizer, which is measured on all the same
            features = features.detach().requires_grad_()
        return self.losses_of(features, batch, step)

    def losses_of(self, features: Tensor, batch: DomainBatch, step: int) -> Losses:
        """The losses of a batch with these features."""
        balance = self.balance if step >= self.penalty_from - self.ramp else None
        risk, penalty = self.risk_and_penalty(features, batch)
        if balance:
            balance.observe(features, risk, penalty)
        weight = self.weight(step)
        total = risk + self.l2_term()
        if isinstance(weight, Tensor) or weight > 0:
            total = total + weight * penalty
        if self.config.rescale and weight > 1:
            total = total / weight
        shown = weight if isinstance(weight, Tensor) else risk.new_full((), weight)
        return Losses(total, {"risk": risk, "penalty": penalty, "penalty_weight": shown})

    def weight(self, step: int) -> Tensor | float:
        """The weight of the penalty at a step."""
        before = self.config.weight_before
        if step < self.penalty_from:
            return before
        if self.balance is None:
            return self.config.penalty_weight
        return before + self.ramped(step, self.penalty_from) * (self.balance.weight() - before)

    def ramped(self, step: int, switch_on_step: int) -> float:
        """Share of its weight that a penalty has reached on the ramp from its switch-on step."""
        return min(1.0, (step - switch_on_step + 1) / self.ramp)

    def training_step(self, batch: DomainBatch, step: int, optimizers: Mapping[str, Optimizer]) -> Losses:
        if self.config.reset_optimizer and step in self.reset_steps:
            optimizers["main"].state.clear()
        return super().training_step(batch, step, optimizers)
