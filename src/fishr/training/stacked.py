"""A training step of several models at once: networks of one kind, each with weights and data of its own.

Weights and batches are stacked to tensors ``[model, ...]``, and the losses of one model are mapped over them by
:func:`torch.vmap`: a layer of all models is one batched product. Each model's gradient is what it is alone, up to the
order of sums.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fishr.algorithms.base import Algorithm, Losses
from fishr.algorithms.penalized import PenalizedAlgorithm, PenalizedConfig
from fishr.data.base import DomainBatch
from fishr.errors import ConfigError

LARGEST_ON_CPU = 2**19
"""Entries of a batch's inputs up to which stacking pays on a CPU, where it saves calls: larger products fill its cores,
and batched ones are slower than one after the other (a quarter, for Colored MNIST in bfloat16)."""


def stacking_pays(batch: DomainBatch) -> bool:
    """Whether models with batches like this one are faster together than one after the other."""
    return batch.inputs.device.type != "cpu" or batch.inputs.numel() <= LARGEST_ON_CPU


class Stack:
    """Models that take their steps together, each on the same batch at every step.

    Args:
        algorithms: The models with their objective, the same but for the weights.
        batches: The batch of each, on the device; domains are as large in one as in another.

    Raises:
        ConfigError: a step of the algorithm is more than a gradient of its losses, which depend on nothing but weights
            and batch.
    """

    def __init__(self, algorithms: Sequence[Algorithm], batches: Sequence[DomainBatch]) -> None:
        self.algorithms = list(algorithms)
        _check(self.algorithms[0])
        self.model = _LossesAsModule(self.algorithms[0], batches[0].sizes)
        self.inputs = torch.stack([batch.inputs for batch in batches])
        self.targets = torch.stack([batch.targets for batch in batches])

    def backward(self, step: int) -> list[Losses]:
        """Compute the gradient of each model's losses, for its optimizer; returns the losses."""
        weights = [dict(algorithm.named_parameters()) for algorithm in self.algorithms]
        stacked = {f"algorithm.{name}": torch.stack([own[name] for own in weights]) for name in weights[0]}

        def of_one(own: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            losses: Losses = functional_call(self.model, own, (inputs, targets, step))
            return losses.total, losses.terms

        totals, terms = torch.vmap(of_one)(stacked, self.inputs, self.targets)
        for algorithm in self.algorithms:
            algorithm.zero_grad()
        totals.sum().backward()  # type: ignore[no-untyped-call]
        return [
            Losses(total, {name: of_models[index] for name, of_models in terms.items()}).detached()
            for index, total in enumerate(totals)
        ]


class _LossesAsModule(nn.Module):
    """The losses of an algorithm as what a module returns, as :func:`functional_call` wants it."""

    def __init__(self, algorithm: Algorithm, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.algorithm, self.sizes = algorithm, sizes

    def forward(self, inputs: Tensor, targets: Tensor, step: int) -> Losses:
        return self.algorithm.losses(DomainBatch(inputs, targets, self.sizes), step)


def _check(algorithm: Algorithm) -> None:
    config = algorithm.config
    own_step = type(algorithm).training_step not in (Algorithm.training_step, PenalizedAlgorithm.training_step)
    problems = {
        "a step of it is more than one gradient": own_step,
        "it starts its optimizer anew (reset_optimizer)": isinstance(config, PenalizedConfig)
        and config.reset_optimizer,
        "its loss is not binary cross-entropy": type(algorithm.loss) is not nn.BCEWithLogitsLoss,
        "it draws random numbers (dropout)": config.dropout > 0,
        "it has state besides weights, such as a moving average (ema) or batch norm": any(
            True for _ in algorithm.buffers()
        ),
    }
    if found := [problem for problem, holds in problems.items() if holds]:
        raise ConfigError(
            f"{algorithm.title} cannot be stacked, as {', '.join(found)}: train its runs one by one, without --stack"
        )
