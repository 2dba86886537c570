"""One rank that trains algorithms on its share of each batch, in a module that a spawned process can import."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fishr.algorithms import ALGORITHMS, Algorithm
from fishr.data.base import Samples
from fishr.data.sampling import BatchSampler
from fishr.training.ranks import Ranks

SIZES, NUM_FEATURES, NUM_CLASSES, STEPS = (7, 2, 4), 5, 3, 5

SETTINGS = {"fishr-covariance": {"variant": "covariance"}, "fishr-strength": {"strength": 0.5}}
"""Further forms of an algorithm, of the name before the dash."""

NAMES = [*(name for name in ALGORITHMS if ALGORITHMS[name].for_ranks), *SETTINGS]
FOR_ONE_DEVICE = {*ALGORITHMS} - {*NAMES}


def algorithm(name: str) -> Algorithm:
    torch.manual_seed(1)
    featurizer = nn.Sequential(nn.Linear(NUM_FEATURES, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    cls = ALGORITHMS[name.split("-")[0] if name in SETTINGS else name]
    config = cls.Config(lr=0.01, l2=1e-3, dropout=0.25, **SETTINGS.get(name, {}))
    if hasattr(config, "switch_on"):
        config = config.updated({"switch_on": 2})
    return cls(featurizer, nn.Linear(4, NUM_CLASSES).double(), len(SIZES), config, steps=20).double()


def trained(name: str, ranks: Ranks) -> dict[str, Tensor]:
    """Weights, buffers and losses after some steps, each on the whole of all domains."""
    learner = algorithm(name)
    generator = torch.Generator().manual_seed(0)
    domains = [
        Samples(
            torch.randn(size, NUM_FEATURES, generator=generator, dtype=torch.float64),
            torch.randint(NUM_CLASSES, (size,), generator=generator),
        )
        for size in SIZES
    ]
    sampler = BatchSampler(domains, None, 0, rank=ranks.index, num_ranks=ranks.number)
    optimizers = learner.configure_optimizers()
    ranks.keep_equal(learner.featurizer, list(optimizers.values()))
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)
        taken = learner.training_step(sampler.batch(step), step, optimizers)
        losses.append(torch.stack([taken.total.detach(), *(term.detach() for term in taken.terms.values())]))
    return {**learner.state_dict(), "losses": torch.cat(losses)}


def rank(index: int, world_size: int, folder: Path) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=(folder / "port").read_text(), NODE_RANK="0", LOCAL_RANK=str(index)
    )
    torch.set_num_threads(1)
    ranks = Ranks("cpu", "32", devices=world_size)
    ranks.launch()
    found = {name: trained(name, ranks) for name in NAMES}
    torch.save(found, folder / f"found-{index}.pt")
    dist.barrier()
    os._exit(0)  # now and then a thread of gloo outlives the group, and C++ aborts where it ends without being joined
