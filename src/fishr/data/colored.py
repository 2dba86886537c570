"""Digits whose color goes with the label more than their shape does, and turns round in the test domain.

The coloring is that of Arjovsky et al. (Invariant Risk Minimization, arXiv 1907.02893):

    label = (digit < 5), flipped with probability ``label_flip``
    color = label, flipped with a probability of the domain's own; the channel of the other color is zero

With label flips of 0.25, shape tells the label 75 % of the time in every domain. Color tells it 80 % and 90 % of the
time in the training domains and 10 % in the test domain: a classifier that relies on it does worse than chance there.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fishr.data.base import MultiDomainDataset, Samples
from fishr.data.mnist import LabeledImages, check_seed_and_subset, mnist_images
from fishr.errors import ConfigError

CLASSES = ("digit 5-9", "digit 0-4")
LABEL_FLIP = 0.25

MNIST_TRAINING_IMAGES = 50_000
DIGITS_TRAINING_SCANS = 1_400
SHIFTS = ((0, 0), (-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
"""Pixels down and to the right."""

_STREAM = 0xC0107
"""Second word of every random seed here: splits and batches use (seed, domain, ...), whose domains are few."""


def colored_mnist_irm(
    root: Path | None = None, seed: int = 0, subset: int | None = None, *, label_flip: float = LABEL_FLIP
) -> MultiDomainDataset:
    """Colored MNIST as in IRM (Arjovsky et al., arXiv 1907.02893) and Fishr's section 5.1 (arXiv 2109.02934).

    The first 50,000 MNIST training images are shuffled; even positions are domain "+80%", odd ones "+90%" (25,000
    each). The last 10,000 are domain "-90%", the one to hold out, and once more, with the same labels and both
    channels kept, the evaluation-only domain "gray". Every second pixel of every second row is taken.

    Args:
        root: Data root with MNIST in it; see :func:`fishr.data.mnist.data_root`.
        seed: Seed of the shuffle, the label flips and the colors.
        subset: Keep the first samples of each domain, as many as this; None keeps all.
        label_flip: Probability that a label is flipped, in [0, 0.5].

    Returns:
        Inputs float32 ``[sample, 392]`` in [0, 1] (2 channels of 14×14, flattened), targets 0 or 1, for a single logit.

    Raises:
        ConfigError: a seed, subset or label flip out of range.
        DataError: MNIST is damaged, or missing and cannot be downloaded.
    """
    check_seed_and_subset(seed, subset)
    _check_label_flip(label_flip)
    images, digits = mnist_images(root).train
    images = images[:, ::2, ::2]
    order = _generator(seed, 0).permutation(MNIST_TRAINING_IMAGES)
    parts = {
        "+80%": LabeledImages(images[order[0::2]], digits[order[0::2]]),
        "+90%": LabeledImages(images[order[1::2]], digits[order[1::2]]),
        "-90%": LabeledImages(images[MNIST_TRAINING_IMAGES:], digits[MNIST_TRAINING_IMAGES:]),
    }
    return _irm_dataset("colored-mnist-irm", parts, 255, seed, subset, label_flip)


def colored_digits(
    root: Path | None = None, seed: int = 0, subset: int | None = None, *, label_flip: float = LABEL_FLIP
) -> MultiDomainDataset:
    """Colored Digits: Colored MNIST in small, from scikit-learn's 1,797 scans of 8×8 pixels; nothing to download.

    The first 1,400 scans (UCI Optical Recognition of Handwritten Digits, in their order) go in turn to the domains
    "+80%" and "+90%"; the rest, by other writers, are "-90%" and "gray" as in :func:`colored_mnist_irm`. A training
    scan is repeated under its nine shifts of at most one pixel, all unshifted scans first; each copy has label and
    color flips of its own.

    Args:
        root: Not used.
        seed: Seed of the label flips and the colors.
        subset: Keep the first samples of each domain, as many as this; None keeps all.
        label_flip: Probability that a label is flipped, in [0, 0.5].

    Returns:
        Inputs float32 ``[sample, 128]`` in [0, 1] (2 channels of 8×8, flattened), targets 0 or 1, for a single logit.

    Raises:
        ConfigError: a seed, subset or label flip out of range.
    """
    from sklearn.datasets import load_digits

    check_seed_and_subset(seed, subset)
    _check_label_flip(label_flip)
    scans = load_digits()
    images, digits = scans.images.astype(np.uint8), scans.target.astype(np.int64)
    training, test = np.split(np.arange(len(images)), [DIGITS_TRAINING_SCANS])
    parts = {
        domain: LabeledImages(one_pixel_shifts(images[indices]), np.tile(digits[indices], len(SHIFTS)))
        for domain, indices in (("+80%", training[0::2]), ("+90%", training[1::2]))
    }
    parts["-90%"] = LabeledImages(images[test], digits[test])
    return _irm_dataset("colored-digits", parts, 16, seed, subset, label_flip)


def colored_mnist(root: Path | None = None, seed: int = 0, subset: int | None = None) -> MultiDomainDataset:
    """DomainBed's ColoredMNIST (Gulrajani and Lopez-Paz, arXiv 2007.01434).

    The 70,000 training and test images of MNIST are pooled and shuffled, every third goes to a domain: "+90%", "+80%"
    and "-90%", with color flips 0.1, 0.2 and 0.9 and label flips 0.25. Customarily held out: "-90%".

    Args:
        root: Data root with MNIST in it; see :func:`fishr.data.mnist.data_root`.
        seed: Seed of the shuffle, the label flips and the colors.
        subset: Keep the first samples of each domain, as many as this; None keeps all.

    Returns:
        Inputs float32 ``[sample, 2, 28, 28]`` in [0, 1], targets 0 or 1, for two logits.

    Raises:
        ConfigError: a seed or subset out of range.
        DataError: MNIST is damaged, or missing and cannot be downloaded.
    """
    check_seed_and_subset(seed, subset)
    images, digits = mnist_images(root).pooled()
    order = _generator(seed, 0).permutation(len(images))
    color_flips = {"+90%": 0.1, "+80%": 0.2, "-90%": 0.9}
    domains = {}
    for domain, (name, color_flip) in enumerate(color_flips.items()):
        indices = order[domain :: len(color_flips)][:subset]
        inputs, targets = colored_samples(
            _in_unit_interval(images[indices], white=255),
            digits[indices],
            label_flip=LABEL_FLIP,
            color_flip=color_flip,
            generator=_generator(seed, 1 + domain),
        )
        domains[name] = Samples(inputs, targets)
    return MultiDomainDataset("colored-mnist", "small_images", domains, CLASSES, test_domain="-90%")


def colored_samples(
    images: NDArray[np.float32],
    digits: NDArray[np.int64],
    *,
    label_flip: float,
    color_flip: float,
    generator: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """One domain: noisy labels, and the images in one of two channels.

    Sample i uses the i-th pair of the generator's numbers, so the first samples do not depend on how many follow.

    Args:
        images: ``[sample, row, column]`` in [0, 1].
        digits: ``[sample]``.
        label_flip: Probability that the label is not (digit < 5).
        color_flip: Probability that the color is not the label.
        generator: Source of the flips.

    Returns:
        Inputs float32 ``[sample, color, row, column]``, zero in the channel of the other color; targets int64, 0 or 1.
    """
    flips = generator.random((len(digits), 2)) < (label_flip, color_flip)
    labels = (digits < 5) ^ flips[:, 0]
    colors = labels ^ flips[:, 1]
    inputs = np.zeros((len(images), 2, *images.shape[1:]), np.float32)
    inputs[np.arange(len(images)), colors.astype(np.int64)] = images
    return torch.from_numpy(inputs), torch.from_numpy(labels.astype(np.int64))


def one_pixel_shifts(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The images ``[sample, row, column]`` under each of :data:`SHIFTS`, zero where nothing moves in.

    Returns:
        ``[shift * sample, row, column]``: all images under the first shift, then all under the second, ...
    """
    _, rows, columns = images.shape
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    return np.concatenate(
        [padded[:, 1 - down : 1 - down + rows, 1 - right : 1 - right + columns] for down, right in SHIFTS]
    )


def _irm_dataset(
    name: str, parts: dict[str, LabeledImages], white: int, seed: int, subset: int | None, label_flip: float
) -> MultiDomainDataset:
    """The four domains, from the images and digits of the two training domains and of the test domain."""
    color_flips = {"+80%": 0.2, "+90%": 0.1, "-90%": 0.9}
    domains = {}
    for domain, (domain_name, part) in enumerate(parts.items()):
        inputs, targets = colored_samples(
            _in_unit_interval(part.images[:subset], white),
            part.labels[:subset],
            label_flip=label_flip,
            color_flip=color_flips[domain_name],
            generator=_generator(seed, 1 + domain),
        )
        domains[domain_name] = Samples(inputs.flatten(1), targets)
        shape = inputs.shape[1:]
    uncolored = torch.from_numpy(_in_unit_interval(parts["-90%"].images[:subset], white)).flatten(1)
    domains["gray"] = Samples(torch.cat([uncolored, uncolored], 1), domains["-90%"].targets)
    return MultiDomainDataset(
        name,
        "vectors",
        domains,
        CLASSES,
        test_domain="-90%",
        binary=True,
        evaluation_only=frozenset({"gray"}),
        flattened=(shape[0], shape[1], shape[2]),
    )


def _in_unit_interval(images: NDArray[np.uint8], white: int) -> NDArray[np.float32]:
    scaled: NDArray[np.float32] = np.divide(images, white, dtype=np.float32)
    return scaled


def _generator(seed: int, part: int) -> np.random.Generator:
    return np.random.default_rng((seed, _STREAM, part))


def _check_label_flip(label_flip: float) -> None:
    if not 0 <= label_flip <= 0.5:
        raise ConfigError(f"label_flip is a probability in [0, 0.5], got {label_flip}")
