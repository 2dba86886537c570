"""How long the runs of a sweep take, and how much room, before they start."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from statistics import fmean

import torch

from fishr.algorithms.describe import describe
from fishr.data.base import MultiDomainDataset
from fishr.models.build import build_model
from fishr.sweeps.runs import Order
from fishr.training import RunConfig, measure_cost

RECORD_BYTES, CONFIG_BYTES, WEIGHT_BYTES = 1_000, 2_000, 4
"""What a checkpoint's record, a config and a weight take on disk, about."""

COPIES = 6
"""Of its weights, that a run has on disk while it is made: two checkpoints, each with Adam's two moments."""


@dataclass(frozen=True)
class Estimate:
    """What runs take.

    Attributes:
        seconds: Time, with all processes at work.
        kept: Bytes on disk that stay.
        working: Bytes on disk besides, while runs are made.
    """

    seconds: float
    kept: int
    working: int


def estimate(
    orders: Sequence[Order], datasets: Mapping[str, MultiDomainDataset], processes: int, threads: int
) -> Estimate:
    """What runs take: of each dataset one is measured on a few steps.

    A step of another algorithm takes as many times longer as ``fishr algorithms show`` says; that with a batch of
    another size, proportionally.

    Args:
        orders: The runs.
        datasets: The data, by the names that configs have for them.
        processes: How many runs are made at a time.
        threads: Threads of each of them.
    """
    seconds, kept, largest = 0.0, 0, 0
    for name in dict.fromkeys(order.config.data for order in orders):
        of_dataset = [order for order in orders if order.config.data == name]
        measured = of_dataset[0]
        with _threads(threads):
            cost = measure_cost(measured.config, datasets[name], weights=measured.weights, device=measured.device)
        model = WEIGHT_BYTES * _num_weights(measured.config, datasets[name])
        largest = max(largest, model)
        for order in of_dataset:
            config = order.config
            checkpoints = ceil(config.steps / config.checkpoint_every)
            step = cost.step * _step_cost(config) / _step_cost(measured.config)
            seconds += cost.start + config.steps * step + checkpoints * cost.checkpoint
            kept += CONFIG_BYTES + checkpoints * RECORD_BYTES + model * order.keep_model
    return Estimate(seconds / processes, kept, COPIES * processes * largest)


def _step_cost(config: RunConfig) -> float:
    """Of a training step, in units that are the same for all runs on a dataset."""
    relative = describe(config.algorithm).step_costs.values()
    return (config.hparams.batch_size or 1) * (fmean(relative) if relative else 1.0)


def _num_weights(config: RunConfig, dataset: MultiDomainDataset) -> int:
    featurizer, classifier = build_model(config.model, dataset.input_shape, dataset.num_outputs)
    return sum(weight.numel() for module in (featurizer, classifier) for weight in module.state_dict().values())


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Torch with so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
