"""Splits and batches as functions of their seeds alone: a continued run sees what an unbroken one would have seen."""

from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fishr.data.augmentation import NUM_DRAWS
from fishr.data.base import DomainBatch, MultiDomainDataset, Samples
from fishr.data.color_jitter import ColorChanges
from fishr.data.images import Images
from fishr.errors import ConfigError, DataError
from fishr.functional.distributed import share

T = TypeVar("T", Tensor, NDArray[np.float64])

_SPLIT, _BATCH, _AUGMENT = 0x5917, 0xBA7C, 0xA06E
"""Second word of the seeds, so that splits, batches and transforms never share a stream of random numbers."""


def split_dataset(
    dataset: MultiDomainDataset, out_fraction: float, trial: int, held_out: Collection[str] = ()
) -> dict[str, tuple[Tensor, Tensor]]:
    """In-split and out-split of every domain.

    A split fixed by the data's owner stays as it is. Domains with groups are split by :func:`split_groups`, all others
    by :func:`split_indices`. Domains that are not trained on, held out or for evaluation only, need not have both: if
    all their samples would lie in the out-split they make the in-split, as what is reported of such a domain is its
    in-accuracy.

    Args:
        dataset: The data.
        out_fraction: Share of the out-split, in [0, 1); 0 leaves it empty.
        trial: Seed of the splits.
        held_out: Domains that are not trained on.

    Returns:
        For each domain the sorted indices of its in-split and of its out-split.

    Raises:
        ConfigError: a share outside [0, 1).
        DataError: a domain to train on with too few samples or groups for both splits, or whose owner gave it but
            one; a fixed split that puts samples of a group, in domains to train on, on both sides.
    """
    trained_on = [name for name in dataset.trainable_domains if name not in held_out]
    splits = {}
    by_group = split_groups(dataset.groups, out_fraction, trial)
    for index, (name, samples) in enumerate(dataset.domains.items()):
        size = len(samples.targets)
        if out_fraction > 0 and name in dataset.fixed_out:
            out = dataset.fixed_out[name]
        elif name in by_group:
            out = by_group[name]
        else:
            splits[name] = split_indices(size, out_fraction, trial, index)
            if out_fraction > 0 and len(splits[name][1]) == 0 and name in trained_on:
                least = next(size for size in count(1) if int(size * out_fraction) > 0)
                raise DataError(
                    f"domain {name!r} has {size} samples, too few for an out-split of {100 * out_fraction:.3g}%: "
                    f"use more of its samples, at least {least}"
                )
            continue
        if out_fraction > 0 and name in trained_on:
            _check_both(dataset, name, out)
        if out.all() and name not in trained_on:
            out = ~out
        splits[name] = torch.from_numpy(np.flatnonzero(~out)), torch.from_numpy(np.flatnonzero(out))
    if out_fraction > 0:
        _check_groups(dataset, {name: splits[name] for name in trained_on})
    return splits


def _check_both(dataset: MultiDomainDataset, name: str, out: NDArray[np.bool_]) -> None:
    """Raises DataError for a split of a domain by its owner or by groups, one side of which is empty."""
    if out.any() and not out.all():
        return
    side, other = ("in", "out") if out.all() else ("out", "in")
    if name in dataset.fixed_out:
        advice = "give some of them the split " + ("'train'" if out.all() else "'val'")
    elif len(np.unique(dataset.groups[name])) == 1:
        advice = "they are one group, which is not divided, and at least 2 groups are needed"
    else:
        advice = "choose another out_fraction or trial, or use more of its groups"
    raise DataError(
        f"domain {name!r} of {dataset.name!r}, which is trained on, has nothing in its {side}-split: all its "
        f"{len(out)} samples are in the {other}-split: {advice}"
    )


def _check_groups(dataset: MultiDomainDataset, splits: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Raises DataError for groups that a fixed split puts on both sides, in the domains whose splits these are."""
    inside, outside = (
        {
            group
            for name, sides in splits.items()
            if name in dataset.groups
            for group in dataset.groups[name][sides[side]].tolist()
        }
        for side in (0, 1)
    )
    if torn := len(inside & outside):
        raise DataError(
            f"the split of {dataset.name!r} puts {torn} of {len(inside | outside)} groups on both sides: give all "
            "samples of a group the same split, or leave the split out"
        )


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
    _check_fraction(out_fraction)
    out_size = int(size * out_fraction)
    order = np.random.default_rng((trial, _SPLIT, domain)).permutation(size)
    return torch.from_numpy(np.sort(order[out_size:])), torch.from_numpy(np.sort(order[:out_size]))


def split_groups(
    groups: Mapping[str, NDArray[np.int64]], out_fraction: float, trial: int
) -> dict[str, NDArray[np.bool_]]:
    """A split that keeps each group together, in all domains where it has samples.

    Groups are taken in an order that depends on the trial. One goes to the out-split if that brings the out-split of
    none of its domains further from its share than leaving it out. A domain that would have none there gives its
    smallest one.

    Args:
        groups: For each domain the group of each sample, int64 ``[sample]``.
        out_fraction: Share of the out-split, in [0, 1).
        trial: Seed of the split.

    Returns:
        For each domain whether a sample lies in the out-split, bool ``[sample]``.

    Raises:
        ConfigError: a share outside [0, 1).
    """
    _check_fraction(out_fraction)
    if not groups:
        return {}
    names, codes = np.unique(np.concatenate(list(groups.values())), return_inverse=True)
    members = np.split(codes, np.cumsum([len(of_domain) for of_domain in groups.values()])[:-1])
    counts = np.stack([np.bincount(of_domain, minlength=len(names)) for of_domain in members], axis=1)
    missing = out_fraction * counts.sum(axis=0)
    out = np.zeros(len(names), dtype=bool)
    for group in np.random.default_rng((trial, _SPLIT)).permutation(len(names)):
        touched = counts[group] > 0
        if np.all(counts[group][touched] <= 2 * missing[touched]):
            out[group] = True
            missing -= counts[group]
    for of_domain in members:
        of_domain = np.unique(of_domain)
        if out_fraction > 0 and len(of_domain) > 1 and not out[of_domain].any():
            out[of_domain[counts[of_domain].sum(axis=1).argmin()]] = True
    return {name: out[of_domain] for name, of_domain in zip(groups, members, strict=True)}


class BatchSampler:
    """Batches for training: from every domain ``batch_size`` samples, drawn with replacement.

    The batch of a step, transforms of images included, is a function of (seed, domain, step). Without a batch size
    every batch is the whole of all domains. The images of the next step are read while the current one is used. For an
    accelerator their colors are left to :meth:`DomainBatch.to`, and for a GPU batches lie in pinned memory.

    Args:
        domains: The samples to train on, one entry for each training domain.
        batch_size: Samples of each domain in a batch; None for all.
        seed: Seed of the draws.
        class_balanced: Draw the class first, each that the domain has as likely, then a sample of it.
        rank: Whose share of the inputs is read.
        num_ranks: How many share a batch out; it is the same batch for any number.
        device: Where the batches are going.

    Raises:
        ConfigError: a batch size below 1, or none where classes are to be balanced.
    """

    def __init__(
        self,
        domains: list[Samples],
        batch_size: int | None,
        seed: int,
        *,
        class_balanced: bool = False,
        rank: int = 0,
        num_ranks: int = 1,
        device: torch.device = torch.device("cpu"),
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        if batch_size is None and (class_balanced or any(isinstance(samples.inputs, Images) for samples in domains)):
            raise ConfigError("batch_size must be a number for images and for class-balanced batches, got null")
        self.domains, self.batch_size, self.seed, self.device = domains, batch_size, seed, device
        self.rank, self.num_ranks = rank, num_ranks
        self._members = [_members_of_classes(samples.targets) if class_balanced else None for samples in domains]
        self._everything = self._whole() if batch_size is None else None
        self._ahead: tuple[int, Future[DomainBatch]] | None = None
        self._reads_ahead = any(isinstance(samples.inputs, Images) for samples in domains)
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="fishr-batches", initializer=_use_device, initargs=(device,)
        )

    def batch(self, step: int) -> DomainBatch:
        """The batch of a step."""
        if self._everything is not None:
            return self._everything
        if not self._reads_ahead:
            return self._make(step)
        ready = self._ahead
        future = ready[1] if ready is not None and ready[0] == step else self._thread.submit(self._make, step)
        self._ahead = step + 1, self._thread.submit(self._make, step + 1)
        return future.result()

    def _whole(self) -> DomainBatch:
        inputs = [self._own(samples.inputs) for samples in self.domains if isinstance(samples.inputs, Tensor)]
        return self._batch(inputs, [samples.targets for samples in self.domains]).to(self.device)

    def _make(self, step: int) -> DomainBatch:
        inputs, targets, uncolored = [], [], []
        for domain, samples in enumerate(self.domains):
            indices = self._draw(domain, step)
            targets.append(samples.targets[indices])
            own = self._own(indices)
            if isinstance(samples.inputs, Images):
                generator = np.random.default_rng((self.seed, _AUGMENT, domain, step))
                draws = self._own(generator.random((len(indices), NUM_DRAWS)))
                inputs.append(samples.inputs.augmented(own, draws, color=self.device.type == "cpu"))
                if samples.inputs.changes_color and self.device.type != "cpu":
                    uncolored.append(draws)
            else:
                inputs.append(samples.inputs.index_select(0, own))  # a third of the time of inputs[own]
        batch = self._batch(inputs, targets)
        if uncolored:
            batch = replace(batch, colors=ColorChanges.of(np.concatenate(uncolored)))
        return batch.pin_memory() if self.device.type == "cuda" else batch

    def _own(self, values: T) -> T:
        """This rank's share of what there is of each sample of a domain."""
        own: T = values[share(len(values), self.rank, self.num_ranks)]
        return own

    def _batch(self, inputs: list[Tensor], targets: list[Tensor]) -> DomainBatch:
        return replace(DomainBatch.of(inputs, targets), rank=self.rank, num_ranks=self.num_ranks)

    def _draw(self, domain: int, step: int) -> Tensor:
        generator = np.random.default_rng((self.seed, _BATCH, domain, step))
        members = self._members[domain]
        if members is None:
            return torch.from_numpy(generator.integers(len(self.domains[domain].targets), size=self.batch_size))
        chosen = []
        # One number for each sample: its whole part is the class, the rest tells which of the class.
        for draw in len(members) * generator.random(self.batch_size):
            of_class = members[int(draw)]
            chosen.append(of_class[int(draw % 1 * len(of_class))])
        return torch.tensor(chosen)


def _use_device(device: torch.device) -> None:
    """A new thread begins on the first GPU, and pinning memory would take a part of that one for each process."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def _members_of_classes(targets: Tensor) -> list[NDArray[np.int64]]:
    return [np.flatnonzero(targets.numpy() == label) for label in np.unique(targets.numpy())]


def _check_fraction(out_fraction: float) -> None:
    if not 0 <= out_fraction < 1:
        raise ConfigError(f"the share of the out-split must lie in [0, 1), got {out_fraction}")
