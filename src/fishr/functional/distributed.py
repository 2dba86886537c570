"""Sums over the ranks of a data-parallel run."""

import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether several ranks share a batch."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over ranks; without several ranks, leave it."""
    if is_distributed():
        for tensor in tensors:
            dist.all_reduce(tensor)
