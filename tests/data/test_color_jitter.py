"""Colors changed by tensor operations: against the operations one by one, and against the host's on bytes."""

import colorsys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fishr.data.augmentation import ATTEMPTS, NUM_DRAWS, ORDERS, augment
from fishr.data.color_jitter import ColorChanges, turn_hue
from fishr.data.image_format import ImageFormat, read_image

FLIP, ORDER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY = range(2 * ATTEMPTS + 2, NUM_DRAWS)
LUMA = np.array([0.299, 0.587, 0.114])


def uniform(count: int, seed: int = 0) -> np.ndarray:
    """Draws that crop and flip nothing off a square image."""
    draws = np.random.default_rng(seed).random((count, NUM_DRAWS))
    draws[:, :ATTEMPTS], draws[:, ATTEMPTS : 2 * ATTEMPTS], draws[:, FLIP] = np.nextafter(1, 0), 0.5, 0.9
    return draws


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


def as_tensor(images: np.ndarray) -> Tensor:
    """``[sample, row, column, channel]`` as a sampler lays it."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def changed(images: np.ndarray, draws: np.ndarray) -> np.ndarray:
    return ColorChanges.of(draws).applied(as_tensor(images)).permute(0, 2, 3, 1).numpy()


def one_by_one(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """An RGB image after the jitter's operations in the order of its draws, then grayscale; in float64."""
    image = image.astype(np.float64)
    changes = 0.3 * (2 * draws[[BRIGHTNESS, CONTRAST, SATURATION, HUE]] - 1)
    for operation in ORDERS[int(draws[ORDER] * 24)]:
        gray = np.round(image @ LUMA)[..., None]
        if operation == 3:
            pixels = [colorsys.rgb_to_hsv(*pixel) for pixel in image.reshape(-1, 3) / 255]
            turned = [colorsys.hsv_to_rgb((h + changes[3]) % 1, s, v) for h, s, v in pixels]
            image = np.round(255 * np.array(turned)).reshape(image.shape)
            continue
        center = (0.0, np.round(gray.mean()), gray)[operation]
        image = np.floor(np.clip(center + (1 + changes[operation]) * (image - center), 0, 255) + 1e-4)
    return np.broadcast_to(np.round(image @ LUMA)[..., None], image.shape) if draws[GRAY] < 0.1 else image


def test_each_sample_has_its_own_changes_in_its_own_order() -> None:
    draws = uniform(60)
    draws[:24, ORDER] = (np.arange(24) + 0.5) / 24
    images = noise(60, 5, 7, 3)
    expected = np.stack([one_by_one(*pair) for pair in zip(images, draws, strict=True)])
    difference = np.abs(changed(images, draws) - expected)
    assert (difference > 0).mean() < 0.01  # where float32 and float64 fall on two sides of a whole number
    assert difference.max() <= 2
    assert set(np.flatnonzero(draws[:, GRAY] < 0.1)) == {
        index for index, image in enumerate(expected) if (image == image[..., :1]).all()
    }


@pytest.mark.parametrize("draw", [0.0, np.nextafter(1, 0)])
def test_factors_reach_from_end_to_end(draw: float) -> None:
    draws = uniform(24)
    draws[:, ORDER] = (np.arange(24) + 0.5) / 24
    draws[:, BRIGHTNESS : HUE + 1], draws[:, GRAY] = draw, 0.5
    images = noise(24, 4, 4, 3, seed=1)
    expected = np.stack([one_by_one(*pair) for pair in zip(images, draws, strict=True)])
    assert np.abs(changed(images, draws) - expected).max() <= 2


@pytest.mark.parametrize("order", [0.01, 0.99])
def test_hues_that_are_all_turned_in_one_step(order: float) -> None:
    draws = uniform(3)
    draws[:, ORDER], draws[:, GRAY] = order, 0.5
    images = noise(3, 4, 4, 3)
    expected = np.stack([one_by_one(*pair) for pair in zip(images, draws, strict=True)])
    assert np.abs(changed(images, draws) - expected).max() <= 1
    assert sum(count > 0 for count in ColorChanges.of(draws).turned) == 1


def on_the_host(images: list[np.ndarray] | np.ndarray, draws: np.ndarray, channels: int = 3) -> np.ndarray:
    format = ImageFormat(len(images[0]), channels)
    pairs = zip(images, draws, strict=True)
    return np.stack([augment(image, format, "domainbed", row) for image, row in pairs]).astype(int)


@pytest.mark.parametrize("shape", [(16, 16, 1), (16, 16, 3)], ids=["one channel", "three channels"])
def test_gray_images_are_the_hosts(shape: tuple[int, ...]) -> None:
    """In which nothing is left of hue, where alone the host computes otherwise."""
    draws = uniform(100)
    images = np.broadcast_to(noise(100, 16, 16, 1), (100, *shape)).copy()
    difference = np.abs(changed(images, draws) - on_the_host(images, draws, shape[2]))
    assert (difference > 0).mean() < 0.001
    assert difference.max() <= 1


def test_photographs_are_near_to_the_hosts(data_root: Path) -> None:
    folders = [domain / "dog" for domain in sorted((data_root / "PACS").iterdir()) if domain.is_dir()]
    format = ImageFormat(224)
    paths = [path for folder in folders for path in sorted(folder.iterdir())[:6]]
    photos = np.stack([format.fit(read_image(path, format)) for path in paths])
    draws = uniform(len(photos))
    difference = changed(photos, draws) - on_the_host(photos, draws)
    # 0.2, 1.0 of an image, and 13 were seen.
    assert np.abs(difference).mean() < 0.5
    assert np.abs(difference).mean((1, 2, 3)).max() < 2
    assert np.abs(difference).max() <= 24
    assert abs(difference.mean()) < 0.3


def test_alpha_stays() -> None:
    draws = uniform(20)
    images = noise(20, 6, 6, 4)
    result = changed(images, draws)
    np.testing.assert_array_equal(result[..., 3], images[..., 3])
    np.testing.assert_array_equal(result[..., :3], changed(images[..., :3], draws))


def test_images_stay_as_they_are_and_keep_their_layout() -> None:
    images = as_tensor(noise(8, 6, 6, 3))
    before = images.clone()
    result = ColorChanges.of(uniform(8)).applied(images)
    assert torch.equal(images, before)
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)


COLORS = [(0, 0, 0), (255, 255, 255), (90, 90, 90), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (1, 2, 3)]


@pytest.mark.parametrize("turn", [-0.3, -1 / 6, -0.01, 0.0, 0.1, 1 / 3, 0.3])
def test_hue_is_the_exact_one(turn: float) -> None:
    pixels = np.concatenate([np.array(COLORS), noise(56, 3)]).astype(np.float64)
    hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in pixels / 255]
    expected = 255 * np.array([colorsys.hsv_to_rgb((h + turn) % 1, s, v) for h, s, v in hsv])
    image = torch.from_numpy(pixels.reshape(1, 8, 8, 3)).permute(0, 3, 1, 2)
    turned = turn_hue(image, torch.tensor([turn], dtype=torch.float64)).permute(0, 2, 3, 1).reshape(-1, 3)
    np.testing.assert_allclose(turned.numpy(), expected, atol=1e-9)


def test_a_turn_is_of_its_image() -> None:
    images = as_tensor(noise(3, 4, 4, 3)).float()
    turns = torch.tensor([0.1, 0.0, -0.2])
    alone = [turn_hue(images[index : index + 1], turns[index : index + 1]) for index in range(3)]
    torch.testing.assert_close(turn_hue(images, turns), torch.cat(alone))
    torch.testing.assert_close(alone[1], images[1:2], atol=1e-4, rtol=0)
