"""Data from several domains: datasets by name, splits and batches.

>>> dataset = load_dataset("colored-digits")
>>> list(dataset.domains)
['+80%', '+90%', '-90%', 'gray']
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fishr.data.base import DomainBatch, MultiDomainDataset, Samples
from fishr.data.colored import colored_digits, colored_mnist, colored_mnist_irm
from fishr.data.rotated import rotated_mnist
from fishr.data.sampling import BatchSampler, split_indices
from fishr.errors import ConfigError
from fishr.registry import Registry

DatasetFactory = Callable[..., MultiDomainDataset]
"""``(root: Path | None, seed: int, subset: int | None, ...options of its own, by keyword)`` to a dataset."""

DATASETS: Registry[DatasetFactory] = Registry("dataset")
DATASETS.register("colored-digits", colored_digits)
DATASETS.register("colored-mnist", colored_mnist)
DATASETS.register("colored-mnist-irm", colored_mnist_irm)
DATASETS.register("rotated-mnist", rotated_mnist)


def load_dataset(
    name: str, *, root: Path | None = None, seed: int = 0, subset: int | None = None, **options: Any
) -> MultiDomainDataset:
    """A dataset by its name in :data:`DATASETS`.

    Args:
        name: Name of the dataset.
        root: Data root; default ``$FISHR_DATA``, else ``fishr`` in the user's cache folder.
        seed: Seed of everything random in the dataset.
        subset: Keep the first samples of each domain, as many as this; None keeps all.
        options: Options of that dataset alone.

    Raises:
        ConfigError: a dataset or an option that does not exist, or a value that an option cannot take.
        DataError: the data are damaged, or missing and cannot be downloaded.
    """
    factory = DATASETS[name]
    known = [option for option in inspect.signature(factory).parameters if option not in ("root", "seed", "subset")]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ConfigError(
            f"dataset {name!r} has no option {', '.join(map(repr, unknown))}; "
            f"options it takes: {', '.join(known) or 'none'}"
        )
    dataset = factory(root=root, seed=seed, subset=subset, **options)
    return replace(dataset, options={"seed": seed, "subset": subset, **options})


__all__ = [
    "DATASETS",
    "BatchSampler",
    "DatasetFactory",
    "DomainBatch",
    "MultiDomainDataset",
    "Samples",
    "load_dataset",
    "split_indices",
]
