"""Which sample belongs to which domain: indices or sizes, checked once and brought into one form."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fishr.errors import InputError
from fishr.functional.distributed import is_distributed, sum_over_ranks

Domains = Tensor | Sequence[int]
"""int64 ``[sample]``, the domain of each sample; or sizes, when samples lie domain after domain."""


def values_may_be_checked(tensor: Tensor) -> bool:
    """Whether looking at a tensor's values is free of harm: on CPU, or in anomaly-detection mode.

    On an accelerator a look at a value makes the host wait; in a compiled step it breaks the graph.
    """
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or torch.is_anomaly_enabled()


@dataclass(frozen=True)
class DomainLayout:
    """Where the samples of each domain lie.

    Attributes:
        order: int64 ``[sample]``, the samples domain after domain; None when they lie so.
        sizes: Samples of each domain, those that do not count included.
        counts: ``[domain]``, the samples of each domain that count, over all ranks that share the samples out.
    """

    order: Tensor | None
    sizes: tuple[int, ...]
    counts: Tensor

    def chunks(self, num_samples: int) -> Iterator[tuple[int, slice | Tensor]]:
        """A domain and at most so many of its samples, until there are no more."""
        start = 0
        for domain, size in enumerate(self.sizes):
            for begin in range(start, start + size, num_samples):
                rows = slice(begin, min(begin + num_samples, start + size))
                yield domain, rows if self.order is None else self.order[rows]
            start += size


def domain_layout(
    domains: Domains, num_domains: int, num_samples: int, mask: Tensor | None, like: Tensor, *, over_ranks: bool
) -> DomainLayout:
    """Check which sample belongs to which domain.

    Args:
        domains: As :data:`Domains`.
        num_domains: Number of domains.
        num_samples: Samples of the batch.
        mask: bool ``[sample]``, the samples that count; None when all do.
        like: A tensor of the type and on the device that the counts are to have.
        over_ranks: Whether the ranks of a data-parallel run, if there are several, share the samples out.

    Raises:
        InputError: fewer than two domains, a domain index out of range, a mask of another shape, or a domain without a
            sample on any rank. Value checks run where they cost no device synchronisation.
    """
    if num_domains < 2:
        raise InputError(f"num_domains must be at least 2, got {num_domains}: variances are compared across domains")
    if mask is not None and (mask.shape != (num_samples,) or mask.dtype != torch.bool):
        raise InputError(f"mask must be a bool tensor [sample] = [{num_samples}], got {_describe(mask)}")
    order = None
    if isinstance(domains, Tensor):
        order, sizes = _sort_indices(domains, num_domains, num_samples)
    else:
        sizes = _check_sizes(domains, num_domains, num_samples)
    over_ranks = over_ranks and is_distributed()
    if not over_ranks:
        _check_no_domain_is_empty(sizes)
    if mask is None:
        # Filled on the device: copying a host tensor there would make the host wait.
        counts = torch.stack([like.new_full((), size) for size in sizes])
    else:
        parts = torch.split(mask if order is None else mask[order], list(sizes))
        counts = torch.stack([part.sum(dtype=like.dtype) for part in parts])
    if over_ranks:
        counts = sum_over_ranks(counts)
    if (mask is not None or over_ranks) and values_may_be_checked(counts):
        _check_no_domain_is_empty(counts.tolist())
    return DomainLayout(order, sizes, counts)


@dataclass(frozen=True)
class GroupedSamples:
    """Samples laid domain after domain.

    Attributes:
        features: ``[sample, feature]``.
        residuals: ``[sample, class]``, zero for samples that do not count.
        mask: ``[sample]`` bool, the samples that count; None when all do.
        sizes: Samples of each domain, those that do not count included.
        counts: ``[domain]``, the samples of each domain that count, over all ranks that share the samples out.
    """

    features: Tensor
    residuals: Tensor
    mask: Tensor | None
    sizes: tuple[int, ...]
    counts: Tensor


def group_by_domain(
    features: Tensor,
    residuals: Tensor,
    domains: Domains,
    num_domains: int,
    mask: Tensor | None,
    *,
    over_ranks: bool,
) -> GroupedSamples:
    """Check the arguments of the penalty functions and lay the samples domain after domain.

    Moments need float32: half-precision features stay as they are (they are widened piece by piece
    later), half-precision residuals are widened here.

    Raises:
        InputError: shapes that do not fit, or what :func:`domain_layout` raises.
    """
    if features.ndim != 2 or residuals.ndim != 2 or features.shape[0] != residuals.shape[0]:
        raise InputError(
            "features must be [sample, feature] and residuals [sample, class] with the same samples, "
            f"got {list(features.shape)} and {list(residuals.shape)}; flatten or pool other dimensions first"
        )
    if residuals.dtype not in (torch.float32, torch.float64):
        residuals = residuals.float()
    layout = domain_layout(domains, num_domains, len(features), mask, residuals, over_ranks=over_ranks)
    if layout.order is not None:
        features, residuals = features[layout.order], residuals[layout.order]
        mask = None if mask is None else mask[layout.order]
    if mask is not None:
        residuals = residuals * mask.unsqueeze(1)
    return GroupedSamples(features, residuals, mask, layout.sizes, layout.counts)


def _sort_indices(domains: Tensor, num_domains: int, num_samples: int) -> tuple[Tensor, tuple[int, ...]]:
    if domains.shape != (num_samples,) or domains.dtype != torch.int64:
        raise InputError(f"domains must be an int64 tensor [sample] = [{num_samples}], got {_describe(domains)}")
    if values_may_be_checked(domains) and num_samples:
        low, high = (int(bound) for bound in domains.aminmax())
        _check_index(low if low < 0 else high, num_domains)
    sizes = torch.bincount(domains, minlength=num_domains).tolist()
    _check_index(len(sizes) - 1, num_domains)
    return torch.argsort(domains, stable=True), tuple(sizes)


def _check_index(index: int, num_domains: int) -> None:
    if not 0 <= index < num_domains:
        raise InputError(
            f"domain index {index} is out of range for num_domains={num_domains}: "
            f"indices run from 0 to {num_domains - 1}"
        )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _check_sizes(sizes: Sequence[int], num_domains: int, num_samples: int) -> tuple[int, ...]:
    sizes = tuple(sizes)
    whole = all(isinstance(size, int) and size >= 0 for size in sizes)
    if not whole or len(sizes) != num_domains or sum(sizes) != num_samples:
        raise InputError(
            f"domain sizes must be num_domains={num_domains} counts that add up to the {num_samples} samples, "
            f"got {sizes}; to give the domain of each sample, pass an int64 tensor"
        )
    return sizes


def _check_no_domain_is_empty(counts: Sequence[float]) -> None:
    empty = [domain for domain, count in enumerate(counts) if count == 0]
    if empty:
        named = ", ".join(map(str, empty))
        raise InputError(
            f"domain {named} has no sample in this batch (samples per domain: {[int(count) for count in counts]}); "
            "every domain needs at least one: sample a part of each batch from every domain"
        )
