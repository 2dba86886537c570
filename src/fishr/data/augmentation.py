"""Random forms of an image for training: the published recipe of DomainBed, and parts of it.

Every operation has the meaning, the distribution and the order of its counterpart in ``torchvision.transforms`` on PIL
images: RandomResizedCrop(size, scale=(0.7, 1)), RandomHorizontalFlip(), ColorJitter(0.3, 0.3, 0.3, 0.3) and
RandomGrayscale(0.1), the recipe of Gulrajani and Lopez-Paz (In search of lost domain generalization, ICLR 2021). OpenCV
does the work, in a fraction of the time; pixels differ by rounding, and where they are resized by the filter's shape.

All functions are pure and may be called from many threads. Up to a size of 300 OpenCV stays in the calling thread; for
larger results it may share the work out among threads of its own, and the result is the same.
"""

import itertools
import math
from typing import Any, Literal, cast, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

from fishr.data.image_format import ImageFormat
from fishr.errors import InputError
from fishr.registry import unknown

Augmentation = Literal["none", "light", "domainbed"]
"""A recipe: the evaluation form, crop and flip, or crop, flip, color jitter and grayscale."""

AREA = (0.7, 1.0)
"""Share of the image that a crop covers."""

RATIO = (3 / 4, 4 / 3)
"""Width over height of a crop, log-uniform."""

ATTEMPTS = 10
"""Crops that are tried before the central one is taken."""

FLIP_PROBABILITY = 0.5
JITTER = 0.3
"""Brightness, contrast and saturation are multiplied by up to 1 ± this, hue is turned by up to ± this of the circle."""

GRAY_PROBABILITY = 0.1

NUM_DRAWS = 2 * ATTEMPTS + 9
"""Uniform numbers in [0, 1) that one sample takes, whatever the recipe."""


def augment(
    image: NDArray[np.uint8], format: ImageFormat, recipe: Augmentation, draws: NDArray[np.float64]
) -> NDArray[np.uint8]:
    """A random form of an image.

    Gray images are not jittered in saturation and hue; alpha is cropped and flipped, its values stay.

    Args:
        image: uint8 ``[row, column, channel]``, only read.
        format: Size and channels of what the network takes.
        recipe: See :data:`Augmentation`.
        draws: ``[NUM_DRAWS]``, all that is random: areas and log-ratios of the attempted crops, then top, left, flip,
            order of the jitter, brightness, contrast, saturation, hue and grayscale.

    Returns:
        uint8 ``[size, size, channel]``, contiguous.

    Raises:
        ConfigError: a recipe that does not exist.
        InputError: an image of another format, or draws of another shape or out of range.
    """
    if recipe not in get_args(Augmentation):
        raise unknown("augmentation", recipe, get_args(Augmentation))
    if draws.shape != (NUM_DRAWS,) or not (draws.min() >= 0 and draws.max() < 1):
        raise InputError(
            f"draws must be {NUM_DRAWS} numbers in [0, 1), got shape {list(draws.shape)}"
            + (f" with values from {draws.min()} to {draws.max()}" if draws.size else "")
        )
    if recipe == "none":
        return format.fit(image)
    format.check(image)
    top, left, height, width = crop_box(image.shape[0], image.shape[1], draws)
    flip, order, brightness, contrast, saturation, hue, gray = draws[2 * ATTEMPTS + 2 :].tolist()
    pixels = image[..., 0] if format.channels == 1 else image
    result = _resized(pixels[top : top + height, left : left + width], format.size)
    if flip < FLIP_PROBABILITY:
        result = _bytes(cv2.flip(result, 1))
    if recipe == "domainbed":
        colors = result if format.channels < 4 else np.ascontiguousarray(result[..., :3])
        changes = [JITTER * (2 * draw - 1) for draw in (brightness, contrast, saturation, hue)]
        for index in ORDERS[int(order * len(ORDERS))]:
            colors = OPERATIONS[index](colors, changes[index])
        if gray < GRAY_PROBABILITY and format.channels > 1:
            colors = _bytes(cv2.cvtColor(_gray(colors), cv2.COLOR_GRAY2RGB))
        result = colors if format.channels < 4 else np.dstack([colors, result[..., 3]])
    return result.reshape(format.size, format.size, format.channels)


def crop_box(rows: int, columns: int, draws: NDArray[np.float64]) -> tuple[int, int, int, int]:
    """Top, left, height and width of the random crop of an image with so many rows and columns.

    Ten times, an area and an aspect ratio are drawn, and the first crop that lies inside the image is taken; if none
    does, the central one with the aspect ratio nearest to the image's.
    """
    attempts = zip(draws[:ATTEMPTS].tolist(), draws[ATTEMPTS : 2 * ATTEMPTS].tolist(), strict=True)
    top, left = draws[2 * ATTEMPTS : 2 * ATTEMPTS + 2].tolist()
    for area, log_ratio in attempts:
        target = rows * columns * (AREA[0] + (AREA[1] - AREA[0]) * area)
        ratio = RATIO[0] * (RATIO[1] / RATIO[0]) ** log_ratio
        width, height = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < width <= columns and 0 < height <= rows:
            return int(top * (rows - height + 1)), int(left * (columns - width + 1)), height, width
    height, width = min(rows, round(columns / RATIO[0])), min(columns, round(rows * RATIO[1]))
    return (rows - height) // 2, (columns - width) // 2, height, width


def adjust_brightness(image: NDArray[np.uint8], change: float) -> NDArray[np.uint8]:
    """Brightness: (1 + change) · image.

    Like the other three, it takes gray ``[row, column]`` and RGB ``[row, column, 3]``, and clips to 0 to 255.
    """
    return _away_from(0, image, change)


def adjust_contrast(image: NDArray[np.uint8], change: float) -> NDArray[np.uint8]:
    """Contrast: m + (1 + change) · (image - m), with m the rounded mean of the image in gray."""
    return _away_from(int(cv2.mean(_gray(image))[0] + 0.5), image, change)


def adjust_saturation(image: NDArray[np.uint8], change: float) -> NDArray[np.uint8]:
    """Saturation: g + (1 + change) · (image - g), with g the image in gray; a gray image as it is."""
    if image.ndim == 2:
        return image
    gray = cv2.cvtColor(_gray(image), cv2.COLOR_GRAY2RGB)
    # PIL cuts the fraction off where OpenCV rounds. Not quite a half, or rounding to even would darken what is exact.
    return _bytes(cv2.addWeighted(image, 1 + change, gray, -change, -0.499))


def adjust_hue(image: NDArray[np.uint8], change: float) -> NDArray[np.uint8]:
    """Hue turned by a share of the full circle; a gray image as it is."""
    if image.ndim == 2:
        return image
    hsv = _bytes(cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL))
    hsv[..., 0] += np.uint8(round(256 * change) % 256)
    return _bytes(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL))


OPERATIONS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
ORDERS = tuple(itertools.permutations(range(len(OPERATIONS))))
"""The 24 orders that the jitter's operations may be done in."""


def _resized(crop: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """To ``[size, size]``, with antialiasing in each axis that shrinks; a new array."""
    rows, columns = crop.shape[:2]
    shrunk = min(columns, size), min(rows, size)
    # Two steps if one axis shrinks and the other grows: for that OpenCV's INTER_AREA has no antialiasing.
    if shrunk != (columns, rows):
        crop = _bytes(cv2.resize(crop, shrunk, interpolation=cv2.INTER_AREA))
    return _bytes(cv2.resize(crop, (size, size), interpolation=cv2.INTER_LINEAR))


def _away_from(center: int, image: NDArray[np.uint8], change: float) -> NDArray[np.uint8]:
    """The image, its distances from the center times 1 + change; clipped, fractions cut off as PIL does."""
    levels = np.arange(256, dtype=np.float32)
    table = np.clip(center + np.float32(1 + change) * (levels - center), 0, 255).astype(np.uint8)
    return _bytes(cv2.LUT(image, table))


def _gray(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return image if image.ndim == 2 else _bytes(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))


def _bytes(image: Any) -> NDArray[np.uint8]:
    """What OpenCV returned; its annotations leave the type open."""
    return cast(NDArray[np.uint8], image)
