"""Rotated MNIST: the same digits, each domain turned by its own angle."""

from pathlib import Path

import numpy as np
import torch

from fishr.data.base import MultiDomainDataset, Samples
from fishr.data.mnist import check_seed_and_subset, mnist_images

ANGLES = (0, 15, 30, 45, 60, 75)
"""Degrees, counter-clockwise."""

_STREAM = 0x207A7E
"""Second word of the random seed: splits and batches use (seed, domain, ...), whose domains are few."""


def rotated_mnist(root: Path | None = None, seed: int = 0, subset: int | None = None) -> MultiDomainDataset:
    """DomainBed's RotatedMNIST (Ghifary et al., arXiv 1508.07680; Gulrajani and Lopez-Paz, arXiv 2007.01434).

    The 70,000 training and test images of MNIST are pooled and shuffled, every sixth goes to a domain and is rotated
    about its center, bilinearly, black where nothing turns in. Customarily held out: "0".

    Args:
        root: Data root with MNIST in it; see :func:`fishr.data.mnist.data_root`.
        seed: Seed of the shuffle.
        subset: Keep the first samples of each domain, as many as this; None keeps all.

    Returns:
        Inputs float32 ``[sample, 1, 28, 28]`` in [0, 1]; targets, the digit, for ten logits.

    Raises:
        ConfigError: a seed or subset out of range.
        DataError: MNIST is damaged, or missing and cannot be downloaded.
    """
    from torchvision.transforms.functional import InterpolationMode, rotate

    check_seed_and_subset(seed, subset)
    images, digits = mnist_images(root).pooled()
    order = np.random.default_rng((seed, _STREAM)).permutation(len(images))
    domains = {}
    for domain, angle in enumerate(ANGLES):
        indices = order[domain :: len(ANGLES)][:subset]
        # Rotated as bytes, thus rounded to 256 gray levels as in the published pipeline, which rotates 8-bit images.
        rotated = rotate(torch.from_numpy(images[indices]).unsqueeze(1), angle, InterpolationMode.BILINEAR)
        domains[str(angle)] = Samples(rotated / 255, torch.from_numpy(digits[indices]))
    return MultiDomainDataset(
        "rotated-mnist", "small_images", domains, tuple(str(digit) for digit in range(10)), test_domain="0"
    )
