"""Datasets of image files: a user's folder or manifest, or one of the benchmark's."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from fishr.data.augmentation import Augmentation
from fishr.data.base import MultiDomainDataset, Samples
from fishr.data.cache import CacheMode
from fishr.data.image_format import ImageFormat
from fishr.data.images import ImageFiles, Images
from fishr.data.listing import (
    BENCHMARKS,
    DomainListing,
    ImageListing,
    existing_path,
    file_sizes,
    fingerprint,
    list_benchmark,
    list_images,
)
from fishr.data.mnist import data_root
from fishr.errors import ConfigError
from fishr.registry import unknown


def listing_of(source: str, root: Path | None = None) -> ImageListing:
    """List the images of a benchmark, by its name, or of a user's folder or manifest, by its path.

    Raises:
        ConfigError: no such benchmark, folder or manifest.
        DataError: one that cannot be used.
    """
    if source in BENCHMARKS:
        return list_benchmark(source, data_root(root))
    path = existing_path(source)
    if path is None:
        raise ConfigError(
            f"{unknown('image dataset', source, BENCHMARKS)}, and there is no folder or manifest {source!r}"
        )
    return list_images(path)


def image_dataset(
    source: Path,
    seed: int = 0,
    subset: int | None = None,
    *,
    strict: bool = False,
    image_size: int = 224,
    channels: int = 3,
    augmentation: Augmentation = "domainbed",
    cache: CacheMode = "disk",
    cache_folder: Path | str | None = None,
) -> MultiDomainDataset:
    """A user's own images: a folder DOMAIN/CLASS/image, or a manifest (CSV or Parquet).

    Args:
        source: The folder, or the manifest: :func:`fishr.data.listing.read_manifest`.
        seed: Not used.
        subset: Keep as many images of each domain as this, evenly spread over its list; None keeps all.
        strict: Refuse data with a class missing from a domain.
        image_size: Images are brought to squares of as many pixels.
        channels: 1 (gray), 3 (RGB) or 4 (RGBA).
        augmentation: What is random about training images: ``"none"``; ``"light"``: crop and flip; ``"domainbed"``:
            color jitter and grayscale too.
        cache: Where decoded images are kept: on ``"disk"``, in ``"ram"``, or nowhere (``"none"``).
        cache_folder: Folder of the disk cache; default ``$FISHR_CACHE``, else the user's cache folder.

    Returns:
        Images that are decoded when the first of them is needed.

    Raises:
        ConfigError: an option that cannot take its value.
        DataError: a folder or manifest that cannot be used, or images that are missing.
    """
    listing = list_images(source, strict=strict)
    return _dataset(listing, subset, image_size, channels, augmentation, cache, cache_folder)


def benchmark_dataset(
    name: str,
    root: Path | None = None,
    seed: int = 0,
    subset: int | None = None,
    *,
    image_size: int = 224,
    channels: int = 3,
    augmentation: Augmentation = "domainbed",
    cache: CacheMode = "disk",
    cache_folder: Path | str | None = None,
) -> MultiDomainDataset:
    """One of :data:`fishr.data.listing.BENCHMARKS` from the data root; else as :func:`image_dataset`."""
    listing = list_benchmark(name, data_root(root))
    return _dataset(listing, subset, image_size, channels, augmentation, cache, cache_folder)


BENCHMARK_DATASETS = {name: partial(benchmark_dataset, name) for name in BENCHMARKS}


def _dataset(
    listing: ImageListing,
    subset: int | None,
    image_size: int,
    channels: int,
    augmentation: Augmentation,
    cache: CacheMode,
    cache_folder: Path | str | None,
) -> MultiDomainDataset:
    image_format = ImageFormat(image_size, channels)
    _check_options(subset, augmentation, cache)
    sizes = file_sizes(listing)
    options = {
        "subset": subset,
        "image_size": image_size,
        "channels": channels,
        "augmentation": augmentation,
        "fingerprint": fingerprint(listing, sizes),
    }
    domains = {name: _spread(domain, subset) for name, domain in listing.domains.items()}
    paths = [listing.root / path for domain in domains.values() for path in domain.paths.to_pylist()]
    cache_folder = None if cache_folder is None else Path(cache_folder).expanduser()
    files = ImageFiles(paths, image_format, cache, cache_folder)
    samples, first = {}, 0
    for name, domain in domains.items():
        indices = np.arange(first, first + len(domain.labels))
        samples[name] = Samples(Images(files, indices, augmentation), torch.from_numpy(domain.labels))
        first += len(indices)
    return MultiDomainDataset(
        listing.name,
        "images",
        samples,
        listing.classes,
        options=options,
        fixed_out={name: domain.out for name, domain in domains.items() if domain.out is not None},
        groups={name: domain.groups for name, domain in domains.items() if domain.groups is not None},
    )


def _spread(domain: DomainListing, subset: int | None) -> DomainListing:
    """As many images as ``subset``, evenly spread: the first ones would be of one class."""
    size = len(domain.labels)
    if subset is None or subset >= size:
        return domain
    kept = np.arange(subset) * size // subset
    return replace(
        domain,
        paths=domain.paths.take(kept),
        labels=domain.labels[kept],
        out=None if domain.out is None else domain.out[kept],
        groups=None if domain.groups is None else domain.groups[kept],
    )


def _check_options(subset: int | None, augmentation: str, cache: str) -> None:
    if subset is not None and subset < 1:
        raise ConfigError(f"subset must be at least 1, got {subset}")
    for kind, value, known in (
        ("augmentation", augmentation, get_args(Augmentation)),
        ("cache", cache, get_args(CacheMode)),
    ):
        if value not in known:
            raise unknown(kind, value, known)
