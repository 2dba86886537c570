"""One rank of a data-parallel run, in a module of its own so that a spawned process can import it."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fishr.errors import InputError
from fishr.functional import domain_gradient_covariance_distance
from fishr.nn import FishrPenalty

NUM_DOMAINS, NUM_FEATURES, NUM_CLASSES, STEPS = 3, 6, 4, 3


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, targets (some ignored) and domains of the whole batch, ragged."""
    generator = torch.Generator().manual_seed(step)
    domains = torch.tensor([0] * 9 + [1] * 5 + [2] * 7)
    inputs = torch.randn(len(domains), NUM_FEATURES, generator=generator, dtype=torch.float64)
    targets = torch.randint(NUM_CLASSES, (len(domains),), generator=generator)
    targets[::6] = -100
    return inputs, targets, domains


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.featurizer = nn.Linear(NUM_FEATURES, NUM_FEATURES).double()
        self.head = nn.Linear(NUM_FEATURES, NUM_CLASSES).double()

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.featurizer(inputs)
        return features, self.head(features)


def gradients_and_history(
    rows_of_step: list[torch.Tensor], wrap: Callable[[nn.Module], nn.Module] = lambda network: network
) -> dict[str, torch.Tensor]:
    """Penalty, gradients and moving average over some steps, each on some rows of its batch."""
    network = Network()
    penalty = FishrPenalty(network.head, NUM_DOMAINS)
    wrapped = wrap(network)
    found = {}
    for step, rows in enumerate(rows_of_step):
        inputs, targets, domains = (values[rows] for values in batch(step))
        network.zero_grad()
        features, logits = wrapped(inputs)
        value = penalty(features, logits, targets, domains)
        value.backward()
        for name, weight in network.named_parameters():
            found[f"{step}/gradient/{name}"] = weight.grad.clone()
        found[f"{step}/value"] = value.detach()
    found["history"] = penalty.average.history
    return found


def rank(index: int, world_size: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=world_size)
    torch.set_num_threads(1)
    # Ragged; in the second step only the first rank has samples of domain 0.
    rows = [torch.arange(21)[index::world_size] for _ in range(STEPS)]
    others = torch.arange(9, 21)[index::world_size]
    rows[1] = torch.cat([torch.arange(9), others]) if index == 0 else others
    found = gradients_and_history(rows, DistributedDataParallel)
    found["errors"] = [
        message_of(lambda: domain_gradient_covariance_distance(torch.ones(4, 2), torch.ones(4, 1), (2, 2), 2))
    ]
    if index == world_size - 1:
        torch.save(found, folder / "found.pt")
    penalty = FishrPenalty(nn.Linear(NUM_FEATURES, NUM_CLASSES), NUM_DOMAINS)
    features, logits, targets = torch.ones(2, NUM_FEATURES), torch.ones(2, NUM_CLASSES), torch.zeros(2).long()
    (folder / f"empty-{index}").write_text(message_of(lambda: penalty(features, logits, targets, (1, 1, 0))))
    dist.destroy_process_group()
    os._exit(0)  # now and then a thread of gloo outlives the group, and C++ aborts where it ends without being joined


def message_of(mistake: Callable[[], object]) -> str:
    try:
        mistake()
    except InputError as error:
        return str(error)
    return ""
