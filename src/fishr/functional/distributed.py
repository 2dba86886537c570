"""What the ranks of a data-parallel run have in common.

A tensor is either whole, the same on all ranks, or a share, the rows of one of them. Each rank computes the gradient of
the same loss L. That of a whole tensor is ∂L/∂X; that of a share x_r, and of weights as rank r uses them on its share,
is W · ∂L/∂x_r with W ranks, so that the mean over ranks, which DistributedDataParallel takes, is the gradient of
one process with the whole batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether several ranks share a batch."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a tensor over ranks; without several ranks, the tensor itself."""
    if not is_distributed():
        return tensor
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def share(size: int, rank: int, num_ranks: int) -> slice:
    """The rows, of ``size``, that a rank has: as many as the others have, or one more.

    >>> [share(8, rank, 3) for rank in range(3)]
    [slice(0, 2, None), slice(2, 5, None), slice(5, 8, None)]
    """
    return slice(size * rank // num_ranks, size * (rank + 1) // num_ranks)


def share_lengths(sizes: Sequence[int], rank: int, num_ranks: int) -> list[int]:
    """Samples of each domain that a rank has."""
    return [len(range(size)[share(size, rank, num_ranks)]) for size in sizes]


def gather_shares(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """The whole of values of samples that lie domain after domain, of each domain :func:`share` on each rank.

    Differentiable, twice too.

    Args:
        values: ``[sample, ...]``, those of this rank.
        sizes: Samples of each domain on all ranks.

    Returns:
        ``[sample, ...]``, those of all ranks, domain after domain.
    """
    gathered: Tensor = _Gather.apply(values, tuple(sizes))
    return gathered


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a tensor over ranks, differentiable: of the gradients of shares it makes the whole gradient."""
    mean: Tensor = _Mean.apply(tensor)
    return mean


@contextmanager
def own_random_numbers(device: torch.device) -> Iterator[None]:
    """Inside, each rank draws random numbers of its own; after it, all go on with those they had in common."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(torch.randint(2**62, ())) + dist.get_rank())
        yield


class _Gather(torch.autograd.Function):
    """Shares to the whole."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.sizes = sizes
        num_ranks = dist.get_world_size()
        lengths = [share_lengths(sizes, rank, num_ranks) for rank in range(num_ranks)]
        padded = values.new_zeros(max(map(sum, lengths)), *values.shape[1:])
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        of_ranks = [torch.split(part[: sum(length)], length) for part, length in zip(parts, lengths, strict=True)]
        return torch.cat([piece for of_domain in zip(*of_ranks, strict=True) for piece in of_domain])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Share.apply(grad, ctx.sizes), None


class _Share(torch.autograd.Function):
    """The whole to this rank's share, times the number of ranks: what gathering makes of a gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.sizes = sizes
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        starts = accumulate(sizes, initial=0)
        rows = [
            values[start : start + size][share(size, rank, num_ranks)]
            for start, size in zip(starts, sizes, strict=False)
        ]
        return torch.cat(rows) * num_ranks

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(grad, ctx.sizes), None


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return sum_over_ranks(tensor) / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
