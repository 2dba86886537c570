"""How long the runs of a sweep take, and how much room, before they start."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil

import torch

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
    orders: Sequence[Order], datasets: Mapping[str, MultiDomainDataset], processes: int, threads: int, device: str
) -> Estimate:
    """What runs take: of each dataset and algorithm one is measured on a few steps.

    A step with a batch of another size takes proportionally longer.

    Args:
        orders: The runs.
        datasets: The data, by the names that configs have for them.
        processes: How many runs are made at a time.
        threads: Threads of each of them.
        device: What is measured on.
    """
    alike: dict[tuple[str, str], list[Order]] = {}
    for order in orders:
        alike.setdefault((order.config.data, order.config.algorithm), []).append(order)
    seconds, kept, largest = 0.0, 0, 0
    for (data, _), of_algorithm in alike.items():
        measured, dataset = of_algorithm[0], datasets[data]
        with _threads(threads):
            cost = measure_cost(measured.config, dataset, weights=measured.weights, device=device)
        model = WEIGHT_BYTES * _num_weights(measured.config, dataset)
        largest = max(largest, model)
        for order in of_algorithm:
            config = order.config
            larger = (config.hparams.batch_size or 1) / (measured.config.hparams.batch_size or 1)
            seconds += replace(cost, step=cost.step * larger).seconds(config.steps, config.checkpoint_every)
            checkpoints = ceil(config.steps / config.checkpoint_every)
            kept += CONFIG_BYTES + checkpoints * RECORD_BYTES + model * order.keep_model
    at_a_time = min(processes, len(orders))
    return Estimate(seconds / at_a_time, kept, COPIES * at_a_time * largest)


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
