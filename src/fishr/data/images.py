"""Images of one domain: read when they are needed, transformed for training or for evaluation."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fishr.data.augmentation import Augmentation, augment
from fishr.data.cache import CacheMode, Progress, StoredImages, store_images
from fishr.data.image_format import ImageFormat
from fishr.devices import num_cpus

T = TypeVar("T")


class ImageFiles:
    """Image files that are decoded, or found in the cache, when the first of them is needed.

    Args:
        paths: The files.
        format: What is decoded of them.
        cache: Where decoded images are kept.
        folder: Folder of the disk cache; see :func:`fishr.data.cache.store_images`.
    """

    def __init__(self, paths: Sequence[Path], format: ImageFormat, cache: CacheMode, folder: Path | None) -> None:
        self.paths, self.format, self.cache, self.folder = paths, format, cache, folder
        self._stored: StoredImages | None = None
        self._lock = Lock()

    def open(self, progress: Progress | None = None) -> StoredImages:
        """The decoded images; the first call decodes those that are not in the cache.

        Raises:
            DataError: images that cannot be read, or a cache that cannot be written.
        """
        with self._lock:
            if self._stored is None:
                self._stored = store_images(self.paths, self.format, self.cache, self.folder, progress)
            return self._stored


class Images:
    """Images that are decoded, or read from the cache, at each access; several threads work on a batch.

    ``images[indices]`` is their evaluation form, uint8 ``[sample, channel, row, column]`` in channels-last memory.

    Args:
        files: Image files, of this domain and maybe of others.
        indices: Which of them are meant, in order.
        augmentation: The recipe of :meth:`augmented`.
    """

    def __init__(self, files: ImageFiles, indices: NDArray[np.int64], augmentation: Augmentation) -> None:
        self.files, self.indices, self.augmentation = files, indices, augmentation

    @property
    def format(self) -> ImageFormat:
        """Size and channels."""
        return self.files.format

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(samples, channels, size, size)``."""
        return len(self), self.format.channels, self.format.size, self.format.size

    def subset(self, indices: Tensor | NDArray[np.int64]) -> "Images":
        """Some of the images; none is read."""
        return Images(self.files, self.indices[np.asarray(indices)], self.augmentation)

    def __getitem__(self, indices: Tensor | slice) -> Tensor:
        chosen = self.indices[indices if isinstance(indices, slice) else np.asarray(indices)]
        stored = self.files.open()
        return self._batch(lambda index: self.format.fit(stored[index]), chosen)

    @property
    def changes_color(self) -> bool:
        """Whether the training form differs in color."""
        return self.augmentation == "domainbed"

    def augmented(self, indices: Tensor, draws: NDArray[np.float64], *, color: bool = True) -> Tensor:
        """Images in a random form, uint8 ``[sample, channel, row, column]``.

        Args:
            indices: Which images.
            draws: Uniform numbers in [0, 1), ``[sample, NUM_DRAWS]``: all that is random about each.
            color: Whether to change colors; if not, :class:`fishr.data.color_jitter.ColorChanges` is what is left.
        """
        stored = self.files.open()
        recipe = "light" if self.changes_color and not color else self.augmentation
        pairs = zip(self.indices[np.asarray(indices)], draws, strict=True)
        return self._batch(lambda pair: augment(stored[pair[0]], self.format, recipe, pair[1]), pairs)

    def _batch(self, transform: Callable[[T], NDArray[np.uint8]], items: Iterable[T]) -> Tensor:
        images = list(_threads().map(transform, items))
        if not images:  # the share of a rank may be none
            return torch.empty(0, *self.shape[1:], dtype=torch.uint8)
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_cpus(), thread_name_prefix="fishr-images")


if hasattr(os, "register_at_fork"):  # not on Windows, which forks no processes
    # A forked process has none of these threads, and would wait for them forever.
    os.register_at_fork(after_in_child=_threads.cache_clear)
