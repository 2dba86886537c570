"""Color jitter and grayscale of a batch as tensor operations, for the device that the network is on.

On an accelerator the host crops, flips and resizes (:mod:`fishr.data.augmentation`), and color, which costs the host
most, is done there from the same random numbers: the same operations in each sample's own order. Values are whole gray
levels after each operation, as there. What differs is hue, which OpenCV turns in 256 steps: on photographs by less than
one level on average.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fishr.data.augmentation import (
    ATTEMPTS,
    GRAY_PROBABILITY,
    JITTER,
    OPERATIONS,
    ORDERS,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
)

IMAGE, GRAY, MEAN = range(3)
"""What is mixed: an image, its gray form, and the mean of that."""

CHANGED_WEIGHTS = {
    adjust_brightness: (1, 0, 0),
    adjust_contrast: (1, 0, -1),
    adjust_saturation: (1, -1, 0),
    adjust_hue: (0, 0, 0),
}
"""How an operation's change adds to the weights (1, 0, 0) of an image that stays as it is."""

LUMA = (0.299, 0.587, 0.114)

ROUNDING = 1e-4
"""Added before fractions are cut off, so that a whole number stays one."""


@dataclass(frozen=True)
class ColorChanges:
    """What is to be done to the colors of a batch, in five steps: the jitter's four operations, and grayscale.

    In each step an image x becomes a · x + b · g + c · m, clipped and cut to whole gray levels, with g its gray form
    and m the mean of g: with f = 1 + change, brightness is (f, 0, 0), contrast (f, 0, 1 − f), saturation (f, 1 − f, 0)
    and grayscale (0, 1, 0). In the step of a sample's hue its weights are (1, 0, 0), and its hue is turned after that.

    Attributes:
        weights: (a, b, c), float32 ``[step, 3, sample]``.
        turns: Share of the full circle by which each hue is turned, float32 ``[sample]``.
        by_turn: The samples in the order of the steps that turn their hues, int64 ``[sample]``.
        turned: How many hues are turned in each step.
    """

    weights: Tensor
    turns: Tensor
    by_turn: Tensor
    turned: tuple[int, ...]

    @classmethod
    def of(cls, draws: NDArray[np.float64]) -> "ColorChanges":
        """The changes that :func:`fishr.data.augmentation.augment` makes with these draws, ``[sample, NUM_DRAWS]``."""
        order, *jitter, gray = draws[:, 2 * ATTEMPTS + 3 :].T
        orders = np.array(ORDERS)[(order * len(ORDERS)).astype(np.int64)]  # [sample, step]
        changes = JITTER * (2 * np.stack(jitter, axis=1) - 1)  # [sample, operation]
        directions = np.array([CHANGED_WEIGHTS[operation] for operation in OPERATIONS])
        weights = np.zeros((len(ORDERS[0]) + 1, 3, len(draws)))
        weights[:, IMAGE] = 1
        weights[:-1] += np.take_along_axis(changes, orders, axis=1).T[:, None] * directions[orders].transpose(1, 2, 0)
        weights[-1][:, gray < GRAY_PROBABILITY] = np.array([[0], [1], [0]])
        step_of_hue = np.argmax(orders == OPERATIONS.index(adjust_hue), axis=1)
        return cls(
            torch.from_numpy(weights.astype(np.float32)),
            torch.from_numpy(changes[:, OPERATIONS.index(adjust_hue)].astype(np.float32)),
            torch.from_numpy(np.argsort(step_of_hue, kind="stable")),
            tuple(np.bincount(step_of_hue, minlength=len(weights)).tolist()),
        )

    def to(self, device: torch.device) -> "ColorChanges":
        """The changes on a device."""
        weights, turns, by_turn = (
            value.to(device, non_blocking=True) for value in (self.weights, self.turns, self.by_turn)
        )
        return replace(self, weights=weights, turns=turns, by_turn=by_turn)

    def pin_memory(self) -> "ColorChanges":
        """The changes in memory from which a GPU copies by itself."""
        weights, turns, by_turn = (value.pin_memory() for value in (self.weights, self.turns, self.by_turn))
        return replace(self, weights=weights, turns=turns, by_turn=by_turn)

    def applied(self, images: Tensor) -> Tensor:
        """Images with their colors changed; alpha stays, and gray images have no hue.

        Args:
            images: ``[sample, channel, row, column]`` on the device of the changes, values from 0 to 255, 1, 3 or 4
                channels.

        Returns:
            The same in float32.
        """
        images = images.float()
        colors, alpha = images[:, :3], images[:, 3:]
        has_hue = colors.shape[1] == 3
        for weights, turned in zip(self.weights, torch.split(self.by_turn, list(self.turned)), strict=True):
            of_image, of_gray, of_mean = weights.view(3, -1, 1, 1, 1)
            gray = _gray(colors)
            mean = gray.mean((2, 3), keepdim=True).round_()
            rest = torch.addcmul(of_mean * mean + ROUNDING, of_gray, gray)
            colors = torch.addcmul(rest, of_image, colors).clamp_(0, 255).floor_()
            if has_hue and len(turned):
                colors.index_copy_(0, turned, turn_hue(colors[turned], self.turns[turned]).round_())
        return torch.cat([colors, alpha], dim=1) if alpha.shape[1] else colors


def turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of each RGB image ``[sample, channel, row, column]`` by its share of the full circle, ``[sample]``.

    With V the largest channel, C its distance to the smallest and H the hue in sixths of the circle, red, green and
    blue are V − C · clip(min(k, 4 − k)), k = (n + H) mod 6, for n = 5, 3 and 1.
    """
    red, green, blue = images.unbind(1)
    largest = images.amax(1)
    chroma = largest - images.amin(1)
    of_red, of_green, of_blue = green - blue, blue - red + 2 * chroma, red - green + 4 * chroma
    hue = torch.where(largest == red, of_red, torch.where(largest == green, of_green, of_blue))
    hue = hue / chroma.clamp_min(torch.finfo(images.dtype).tiny) + 6 * turns.view(-1, 1, 1)
    places = ((hue + offset) % 6 for offset in (5, 3, 1))
    return torch.stack([largest - chroma * torch.minimum(k, 4 - k).clamp_(0, 1) for k in places], dim=1)


def _gray(colors: Tensor) -> Tensor:
    """Luma in whole levels, ``[sample, 1, row, column]``."""
    if colors.shape[1] == 1:
        return colors
    red, green, blue = torch.split(colors, 1, dim=1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).round_()
