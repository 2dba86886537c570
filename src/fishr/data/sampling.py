"""Splits and batches as functions of their seeds alone: a continued run sees what an unbroken one would have seen."""

import numpy as np
import torch
from torch import Tensor

from fishr.data.base import DomainBatch, Samples
from fishr.errors import ConfigError

_SPLIT, _BATCH = 0x5917, 0xBA7C
"""Second word of the seeds, so that splits and batches never share a stream of random numbers."""


def split_indices(size: int, out_fraction: float, trial: int, domain: int) -> tuple[Tensor, Tensor]:
    """In-split and out-split of one domain, by a permutation that depends on trial and domain.

    Args:
        size: Samples of the domain.
        out_fraction: Share of the out-split, in [0, 1); 0 leaves it empty.
        trial: Seed of the split.
        domain: Index of the domain in its dataset.

    Returns:
        Indices of the in-split and of the out-split, each sorted.

    Raises:
        ConfigError: a share outside [0, 1).

    >>> [len(part) for part in split_indices(10, 0.2, trial=0, domain=1)]
    [8, 2]
    """
    if not 0 <= out_fraction < 1:
        raise ConfigError(f"the share of the out-split must lie in [0, 1), got {out_fraction}")
    out_size = int(size * out_fraction)
    order = np.random.default_rng((trial, _SPLIT, domain)).permutation(size)
    return torch.from_numpy(np.sort(order[out_size:])), torch.from_numpy(np.sort(order[:out_size]))


class BatchSampler:
    """Batches for training: from every domain ``batch_size`` samples, drawn with replacement.

    The batch of a step is a function of (seed, domain, step). Without a batch size every batch is the whole of all
    domains.

    Args:
        domains: The samples to train on, one entry for each training domain.
        batch_size: Samples of each domain in a batch; None for all.
        seed: Seed of the draws.
    """

    def __init__(self, domains: list[Samples], batch_size: int | None, seed: int) -> None:
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        self.domains, self.batch_size, self.seed = domains, batch_size, seed
        self._everything = DomainBatch.of(domains) if batch_size is None else None

    def batch(self, step: int) -> DomainBatch:
        if self._everything is not None:
            return self._everything
        parts = []
        for domain, samples in enumerate(self.domains):
            draw = np.random.default_rng((self.seed, _BATCH, domain, step)).integers(
                len(samples.targets), size=self.batch_size
            )
            indices = torch.from_numpy(draw)
            parts.append(Samples(samples.inputs[indices], samples.targets[indices]))
        return DomainBatch.of(parts)
