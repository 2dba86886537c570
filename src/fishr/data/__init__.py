"""Data from several domains: datasets by name, splits and batches.

>>> dataset = load_dataset("colored-digits")
>>> list(dataset.domains)
['+80%', '+90%', '-90%', 'gray']
"""

import inspect
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fishr.data.base import DomainBatch, MultiDomainDataset, Samples
from fishr.data.colored import colored_digits, colored_mnist, colored_mnist_irm
from fishr.data.image_dataset import BENCHMARK_DATASETS, image_dataset
from fishr.data.listing import existing_path
from fishr.data.rotated import rotated_mnist
from fishr.data.sampling import BatchSampler, split_dataset, split_indices
from fishr.errors import ConfigError
from fishr.registry import MODULE_AND_NAME, Registry

DatasetFactory = Callable[..., MultiDomainDataset]
"""``(root: Path | None, seed: int, subset: int | None, ...options of its own, by keyword)`` to a dataset."""

DATASETS: Registry[DatasetFactory] = Registry("dataset", "fishr.datasets")
"""Datasets that have a name; others are found by their paths."""
DATASETS.register("colored-digits", colored_digits)
DATASETS.register("colored-mnist", colored_mnist)
DATASETS.register("colored-mnist-irm", colored_mnist_irm)
DATASETS.register("rotated-mnist", rotated_mnist)
for _name, _factory in BENCHMARK_DATASETS.items():
    DATASETS.register(_name, _factory)

_PUBLISHED = frozenset(DATASETS)

_IMAGE_OPTIONS = [
    option.name
    for option in inspect.signature(image_dataset).parameters.values()
    if option.kind is inspect.Parameter.KEYWORD_ONLY
]


def load_dataset(
    name: str | Path,
    *,
    root: Path | str | None = None,
    seed: int = 0,
    subset: int | None = None,
    **options: Any,
) -> MultiDomainDataset:
    """A dataset by its name in :data:`DATASETS`, or a user's own images by the path of their folder or manifest.

    Args:
        name: Name of the dataset; or a path, which may begin with ``~``; or ``package.module:factory``, where a
            :data:`DatasetFactory` is.
        root: Data root of datasets with a name; default ``$FISHR_DATA``, else ``fishr`` in the user's cache folder.
        seed: Seed of everything random in the dataset.
        subset: Keep as many samples of each domain as this; None keeps all.
        options: Options of that dataset alone; those of images are :func:`fishr.data.image_dataset.image_dataset`'s.

    Raises:
        ConfigError: a dataset or an option that does not exist, or a value that an option cannot take.
        DataError: the data are damaged, or missing and cannot be downloaded.
    """
    name = os.fspath(name)
    factory = _factory_of(name, None if root is None else Path(root))
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        raise ConfigError(f"dataset {name!r} is no factory that takes (root, seed=, subset=)") from None
    known = [option for option in parameters if option not in ("seed", "subset")]
    unknown_options = [option for option in options if option not in known]
    if unknown_options:
        if "image_size" not in known and set(unknown_options) <= set(_IMAGE_OPTIONS):
            raise ConfigError(f"dataset {name!r} takes no image options ({', '.join(map(repr, unknown_options))})")
        raise ConfigError(
            f"dataset {name!r} has no option {', '.join(map(repr, unknown_options))}; "
            f"options it takes: {', '.join(known) or 'none'}"
        )
    dataset = factory(seed=seed, subset=subset, **options)
    if not isinstance(dataset, MultiDomainDataset):
        raise ConfigError(f"the factory of dataset {name!r} returns no MultiDomainDataset, but {dataset!r}")
    given = {"seed": seed, "subset": subset, **options}
    dataset = replace(dataset, options=dataset.options or given, published=name in _PUBLISHED)
    # What another package calls its data need not be unique: runs name it as it was asked for.
    return replace(dataset, name=name) if is_dataset_name(name) and name not in _PUBLISHED else dataset


def is_dataset_name(name: str) -> bool:
    """Whether :func:`load_dataset` takes this for the name of a dataset, not for a path."""
    return name in DATASETS or (MODULE_AND_NAME.fullmatch(name) is not None and existing_path(name) is None)


def _factory_of(name: str, root: Path | None) -> Callable[..., MultiDomainDataset]:
    if name in DATASETS:
        return partial(DATASETS[name], root)
    if path := existing_path(name):
        return partial(image_dataset, path)
    try:
        return partial(DATASETS[name], root)
    except ConfigError as error:
        raise ConfigError(f"{error}, and there is no folder or manifest {name}") from error.__cause__


__all__ = [
    "DATASETS",
    "BatchSampler",
    "DatasetFactory",
    "DomainBatch",
    "MultiDomainDataset",
    "Samples",
    "is_dataset_name",
    "load_dataset",
    "split_dataset",
    "split_indices",
]
