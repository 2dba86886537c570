"""Algorithms that add a penalty to the risk, and the schedule of its weight."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.optim import Optimizer

from fishr.algorithms.base import Algorithm, AlgorithmConfig, Losses
from fishr.data.base import DomainBatch
from fishr.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PenalizedConfig(AlgorithmConfig):
    """Hyperparameters of a penalty and its schedule.

    The weight of the penalty is ``weight_before`` until the switch-on step and ``penalty_weight`` from then on. The
    defaults are DomainBed's convention; the Colored MNIST script's is ``weight_before=1, rescale=True,
    reset_optimizer=False``.

    Attributes:
        penalty_weight: λ, the weight from the switch-on step on.
        switch_on: First step with that weight: a whole number is a step, a decimal a share of the run.
        weight_before: The weight until then.
        rescale: Divide the whole loss by the weight where that is above 1.
        reset_optimizer: Forget the optimizer's state at the switch-on step.
    """

    penalty_weight: float = 1.0
    switch_on: int | float = 0.3
    weight_before: float = 0.0
    rescale: bool = False
    reset_optimizer: bool = True

    def problems(self) -> list[str]:
        negative = [name for name in ("penalty_weight", "weight_before", "switch_on") if getattr(self, name) < 0]
        return super().problems() + [f"{name} must be at least 0, got {getattr(self, name)}" for name in negative]

    def switch_on_step(self, steps: int | None) -> int:
        """The switch-on step of a run of ``steps`` steps.

        Raises:
            ConfigError: ``switch_on`` is a share and the length of the run is not given.
        """
        if isinstance(self.switch_on, int):
            return self.switch_on
        if steps is None:
            raise ConfigError(
                f"switch_on={self.switch_on} is a share of the run: give steps=, the length of the run, "
                "or a whole number, the step itself"
            )
        return math.floor(self.switch_on * steps + 0.5)


class PenalizedAlgorithm(Algorithm):
    """risk + weight(step) · penalty; a subclass defines :meth:`risk_and_penalty`."""

    Config: ClassVar[type[AlgorithmConfig]] = PenalizedConfig
    config: PenalizedConfig

    def setup(self) -> None:
        self.switch_on_step = self.config.switch_on_step(self.steps)
        if self.steps is not None and self.switch_on_step >= self.steps:
            logger.warning(
                "the penalty never switches on: switch_on=%s is step %d of a run of %d steps",
                self.config.switch_on,
                self.switch_on_step,
                self.steps,
            )

    def risk_and_penalty(self, batch: DomainBatch) -> tuple[Tensor, Tensor]:
        """The risk to minimise and the penalty, unweighted."""
        raise NotImplementedError

    def losses(self, batch: DomainBatch, step: int) -> Losses:
        risk, penalty = self.risk_and_penalty(batch)
        weight = self.config.weight_before if step < self.switch_on_step else self.config.penalty_weight
        total = risk + self.l2_term()
        if weight > 0:
            total = total + weight * penalty
        if self.config.rescale and weight > 1:
            total = total / weight
        return Losses(total, {"risk": risk, "penalty": penalty})

    def training_step(self, batch: DomainBatch, step: int, optimizers: Mapping[str, Optimizer]) -> Losses:
        if self.config.reset_optimizer and step == self.switch_on_step:
            optimizers["main"].state.clear()
        return super().training_step(batch, step, optimizers)
