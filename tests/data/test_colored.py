import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from fishr.data import DATASETS, MultiDomainDataset, Samples, load_dataset
from fishr.data.colored import (
    SHIFTS,
    colored_digits,
    colored_mnist,
    colored_mnist_irm,
    colored_samples,
    one_pixel_shifts,
)
from fishr.data.mnist import Mnist, mnist_images
from fishr.errors import ConfigError


def by_channel(inputs: Tensor) -> Tensor:
    """``[sample, color, pixel]``."""
    return inputs.reshape(len(inputs), 2, -1)


def colors(samples: Samples) -> Tensor:
    """The channel that holds the image; the other must be zero throughout."""
    lit = by_channel(samples.inputs).any(2)
    assert (lit.sum(1) == 1).all()
    return lit[:, 1].long()


def color_flip_rate(samples: Samples) -> float:
    return (colors(samples) != samples.targets).double().mean().item()


def within(probability: float, draws: int) -> object:
    """Equal to a measured rate up to four standard errors."""
    return pytest.approx(probability, abs=4 * (probability * (1 - probability) / draws) ** 0.5)


def ink(images: Tensor) -> list[float]:
    """Sum of each image, sorted: the same for two collections of the same images, colored or not."""
    return sorted((images.flatten(1).double() * 255).round().sum(1).tolist())


def true_labels(uncolored: Tensor, originals: np.ndarray, digits: np.ndarray) -> Tensor:
    """Whether the digit is below five, by looking the images in [0, 1] up among the originals."""
    label_of = {image.tobytes(): int(digit < 5) for image, digit in zip(originals, digits, strict=True)}
    images = (uncolored * originals.max()).round().byte().numpy()
    return torch.tensor([label_of[image.tobytes()] for image in images])


def same(one: Samples, other: Samples) -> bool:
    return torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)


# The coloring


def test_the_other_channel_is_zero_and_the_image_untouched() -> None:
    images = np.random.default_rng(0).random((50, 3, 5), np.float32) + 0.1
    samples = Samples(
        *colored_samples(
            images, np.arange(50) % 10, label_flip=0.25, color_flip=0.3, generator=np.random.default_rng(1)
        )
    )
    assert samples.inputs.shape == (50, 2, 3, 5)
    assert set(colors(samples).tolist()) == {0, 1}
    assert torch.equal(samples.inputs.sum(1), torch.from_numpy(images))


def test_without_flips_label_and_color_are_digit_below_five() -> None:
    samples = Samples(
        *colored_samples(
            np.ones((10, 1, 1), np.float32),
            np.arange(10),
            label_flip=0,
            color_flip=0,
            generator=np.random.default_rng(0),
        )
    )
    assert samples.targets.tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert samples.targets.dtype == torch.int64
    assert torch.equal(colors(samples), samples.targets)


@pytest.mark.parametrize("color_flip", [0.1, 0.2, 0.9])
def test_flips_have_their_rates_and_are_independent(color_flip: float) -> None:
    size = 100_000
    digits = np.arange(size) % 10
    samples = Samples(
        *colored_samples(
            np.ones((size, 1, 1), np.float32),
            digits,
            label_flip=0.25,
            color_flip=color_flip,
            generator=np.random.default_rng(0),
        )
    )
    label_flipped = samples.targets.numpy() != (digits < 5)
    color_flipped = (colors(samples) != samples.targets).numpy()
    assert label_flipped.mean() == within(0.25, size)
    assert color_flipped.mean() == within(color_flip, size)
    assert (label_flipped & color_flipped).mean() == within(0.25 * color_flip, size)


def test_shifts_of_a_hand_made_image() -> None:
    image = np.array([[[1, 2, 3], [4, 5, 6], [7, 8, 9]]], np.uint8)
    shifted = dict(zip(SHIFTS, one_pixel_shifts(image).tolist(), strict=True))
    assert shifted == {
        (0, 0): [[1, 2, 3], [4, 5, 6], [7, 8, 9]],
        (-1, -1): [[5, 6, 0], [8, 9, 0], [0, 0, 0]],
        (-1, 0): [[4, 5, 6], [7, 8, 9], [0, 0, 0]],
        (-1, 1): [[0, 4, 5], [0, 7, 8], [0, 0, 0]],
        (0, -1): [[2, 3, 0], [5, 6, 0], [8, 9, 0]],
        (0, 1): [[0, 1, 2], [0, 4, 5], [0, 7, 8]],
        (1, -1): [[0, 0, 0], [2, 3, 0], [5, 6, 0]],
        (1, 0): [[0, 0, 0], [1, 2, 3], [4, 5, 6]],
        (1, 1): [[0, 0, 0], [0, 1, 2], [0, 4, 5]],
    }


def test_shifts_lie_one_after_the_other() -> None:
    images = np.random.default_rng(0).integers(256, size=(4, 5, 6)).astype(np.uint8)
    expected = np.concatenate([one_pixel_shifts(images[[i]])[:, None] for i in range(4)], axis=1)
    assert np.array_equal(one_pixel_shifts(images), expected.reshape(-1, 5, 6))


# Colored Digits


@pytest.fixture(scope="module")
def digits() -> MultiDomainDataset:
    return colored_digits()


def test_colored_digits_facts(digits: MultiDomainDataset) -> None:
    assert (digits.name, digits.kind, digits.binary) == ("colored-digits", "vectors", True)
    assert digits.classes == ("digit 5-9", "digit 0-4")
    assert digits.test_domain == "-90%"
    assert digits.trainable_domains == ("+80%", "+90%", "-90%")
    assert digits.evaluation_only == {"gray"}
    shapes = {domain: tuple(samples.inputs.shape) for domain, samples in digits.domains.items()}
    assert shapes == {"+80%": (6300, 128), "+90%": (6300, 128), "-90%": (397, 128), "gray": (397, 128)}
    for inputs, targets in digits.domains.values():
        assert (inputs.dtype, targets.dtype) == (torch.float32, torch.int64)
        assert (inputs.min(), inputs.max()) == (0, 1)
        assert set(targets.tolist()) == {0, 1}


@pytest.mark.parametrize(("domain", "rate"), [("+80%", 0.2), ("+90%", 0.1), ("-90%", 0.9)])
def test_colored_digits_color_flips(digits: MultiDomainDataset, domain: str, rate: float) -> None:
    samples = digits.domains[domain]
    assert color_flip_rate(samples) == within(rate, len(samples.targets))


def test_colored_digits_uses_every_scan_once_with_its_label() -> None:
    domains = colored_digits(label_flip=0.0).domains
    inputs = torch.cat([domains["+80%"].inputs[:700], domains["+90%"].inputs[:700], domains["-90%"].inputs])
    targets = torch.cat([domains["+80%"].targets[:700], domains["+90%"].targets[:700], domains["-90%"].targets])
    scans = load_digits()
    assert ink(inputs) == ink(torch.from_numpy(scans.images).float() / 16)
    assert torch.equal(targets, true_labels(by_channel(inputs).sum(1), scans.images.astype(np.uint8), scans.target))


def test_colored_digits_noise_differs_between_the_copies_of_a_scan() -> None:
    samples, clean = (colored_digits(label_flip=flip).domains["+80%"] for flip in (0.25, 0.0))
    for flips in (samples.targets != clean.targets, colors(samples) != samples.targets):
        of_scan = flips.reshape(len(SHIFTS), 700).double()
        rate = flips.double().mean()
        # Independent copies: the variance over scans of the mean of nine is a ninth of a single one's.
        assert of_scan.mean(0).var() == pytest.approx((rate * (1 - rate) / 9).item(), rel=0.25)


def test_colored_digits_trains_on_shifted_copies_of_the_same_digit() -> None:
    samples = colored_digits(label_flip=0.0).domains["+90%"]
    digits_below_five = samples.targets.reshape(len(SHIFTS), 700)
    assert (digits_below_five == digits_below_five[0]).all()
    images = by_channel(samples.inputs).sum(1).reshape(len(SHIFTS), 700, 8, 8)
    for (down, right), shifted in zip(SHIFTS, images, strict=True):
        rows, columns = (slice(max(0, -by), 8 - max(0, by)) for by in (down, right))
        to_rows, to_columns = (slice(max(0, by), 8 + min(0, by)) for by in (down, right))
        assert torch.equal(shifted[:, to_rows, to_columns], images[0][:, rows, columns])


def test_colored_digits_label_flip_rate() -> None:
    noisy, clean = colored_digits(label_flip=0.4), colored_digits(label_flip=0.0)
    for domain in ("+80%", "+90%", "-90%"):
        flipped = noisy.domains[domain].targets != clean.domains[domain].targets
        assert flipped.double().mean().item() == within(0.4, len(flipped))


def test_gray_is_the_test_domain_with_both_channels(digits: MultiDomainDataset) -> None:
    test, gray = digits.domains["-90%"], digits.domains["gray"]
    channels = by_channel(gray.inputs)
    assert torch.equal(channels[:, 0], channels[:, 1])
    assert torch.equal(channels[:, 0], by_channel(test.inputs).sum(1))
    assert torch.equal(gray.targets, test.targets)


# Colored MNIST


@pytest.fixture(scope="module")
def original(data_root: Path) -> Mnist:
    return mnist_images(data_root)


@pytest.fixture(scope="module")
def irm(data_root: Path) -> MultiDomainDataset:
    return colored_mnist_irm(data_root)


@pytest.fixture(scope="module")
def domainbed(data_root: Path) -> MultiDomainDataset:
    return colored_mnist(data_root)


def test_irm_facts(irm: MultiDomainDataset) -> None:
    assert (irm.name, irm.kind, irm.binary) == ("colored-mnist-irm", "vectors", True)
    assert irm.classes == ("digit 5-9", "digit 0-4")
    assert irm.test_domain == "-90%"
    assert irm.evaluation_only == {"gray"}
    shapes = {domain: tuple(samples.inputs.shape) for domain, samples in irm.domains.items()}
    assert list(shapes) == ["+80%", "+90%", "-90%", "gray"]
    assert shapes == {"+80%": (25000, 392), "+90%": (25000, 392), "-90%": (10000, 392), "gray": (10000, 392)}
    assert all(samples.inputs.dtype == torch.float32 for samples in irm.domains.values())
    for domain, rate in (("+80%", 0.2), ("+90%", 0.1), ("-90%", 0.9)):
        assert color_flip_rate(irm.domains[domain]) == within(rate, shapes[domain][0])


def test_irm_images_are_every_second_pixel(irm: MultiDomainDataset, original: Mnist) -> None:
    images, digits = original.train
    small = torch.from_numpy(images[:, ::2, ::2] / np.float32(255)).flatten(1)
    gray, targets = irm.domains["gray"]
    assert torch.equal(gray[:, :196], small[50_000:])
    assert torch.equal(gray[:, 196:], small[50_000:])
    assert torch.equal(by_channel(irm.domains["-90%"].inputs).sum(1), small[50_000:])
    assert torch.equal(irm.domains["-90%"].targets, targets)
    flipped = targets.numpy() != (digits[50_000:] < 5)
    assert flipped.mean() == within(0.25, 10_000)
    training = torch.cat([irm.domains["+80%"].inputs, irm.domains["+90%"].inputs])
    assert ink(training) == ink(small[:50_000])


def test_irm_training_labels(irm: MultiDomainDataset, original: Mnist) -> None:
    images, digits = original.train
    for domain in ("+80%", "+90%"):
        inputs, targets = irm.domains[domain]
        flipped = targets != true_labels(by_channel(inputs).sum(1), images[:, ::2, ::2], digits)
        assert flipped.double().mean().item() == within(0.25, 25_000)


def test_irm_label_flip(data_root: Path, original: Mnist) -> None:
    targets = colored_mnist_irm(data_root, label_flip=0.0, subset=500).domains["gray"].targets
    assert targets.tolist() == (original.train.labels[50_000:50_500] < 5).astype(int).tolist()


def test_domainbed_facts(domainbed: MultiDomainDataset) -> None:
    assert (domainbed.name, domainbed.kind, domainbed.binary) == ("colored-mnist", "small_images", False)
    assert domainbed.num_outputs == 2
    assert domainbed.test_domain == "-90%"
    assert domainbed.evaluation_only == frozenset()
    shapes = {domain: tuple(samples.inputs.shape) for domain, samples in domainbed.domains.items()}
    assert list(shapes) == ["+90%", "+80%", "-90%"]
    assert shapes == {"+90%": (23334, 2, 28, 28), "+80%": (23333, 2, 28, 28), "-90%": (23333, 2, 28, 28)}
    for domain, rate in (("+90%", 0.1), ("+80%", 0.2), ("-90%", 0.9)):
        samples = domainbed.domains[domain]
        assert samples.inputs.dtype == torch.float32
        assert color_flip_rate(samples) == within(rate, len(samples.targets))


def test_domainbed_uses_every_image_once_shuffled(domainbed: MultiDomainDataset, original: Mnist) -> None:
    images, digits = original.pooled()
    everything = torch.cat([samples.inputs.flatten(1).sum(1) for samples in domainbed.domains.values()])
    brightness = images.reshape(70_000, -1).sum(1) / 255
    assert np.allclose(np.sort(everything.numpy()), np.sort(brightness), rtol=1e-5)
    in_file_order = torch.from_numpy(brightness[::3])
    assert not np.allclose(domainbed.domains["+90%"].inputs.flatten(1).sum(1), in_file_order)
    for inputs, targets in domainbed.domains.values():
        flipped = targets != true_labels(inputs.sum(1), images, digits)
        assert flipped.double().mean().item() == within(0.25, len(targets))


# What all have in common


@pytest.fixture(params=["colored-digits", "colored-mnist", "colored-mnist-irm"])
def whole_and_root(request: pytest.FixtureRequest) -> tuple[MultiDomainDataset, Path | None]:
    """A whole dataset of seed 0, and the data root that it needs."""
    if request.param == "colored-digits":
        return request.getfixturevalue("digits"), None
    whole = request.getfixturevalue("irm" if request.param == "colored-mnist-irm" else "domainbed")
    return whole, request.getfixturevalue("data_root")


def test_a_subset_is_the_beginning_of_the_whole(whole_and_root: tuple[MultiDomainDataset, Path | None]) -> None:
    """Drawn a second time, so that this also shows the dataset to be a function of its seed."""
    whole, root = whole_and_root
    part = load_dataset(whole.name, root=root, subset=350)
    for domain, samples in whole.domains.items():
        assert same(part.domains[domain], Samples(samples.inputs[:350], samples.targets[:350]))


def test_another_seed_draws_other_images_labels_and_colors(
    whole_and_root: tuple[MultiDomainDataset, Path | None],
) -> None:
    whole, root = whole_and_root
    other = load_dataset(whole.name, root=root, seed=1, subset=350)
    for domain, (inputs, targets) in other.domains.items():
        reference = whole.domains[domain]
        assert not torch.equal(targets, reference.targets[:350])
        if domain != "gray":
            color_flips = colors(other.domains[domain]) != targets
            assert not torch.equal(color_flips, (colors(reference) != reference.targets)[:350])
        fixed_images = whole.name == "colored-digits" or (
            whole.name == "colored-mnist-irm" and domain in ("-90%", "gray")
        )
        if not fixed_images:
            images = by_channel(inputs).sum(1)
            assert not torch.equal(images, by_channel(reference.inputs[:350]).sum(1))


def test_a_subset_larger_than_a_domain_keeps_it_whole(digits: MultiDomainDataset) -> None:
    part = colored_digits(subset=1000)
    assert [len(samples.targets) for samples in part.domains.values()] == [1000, 1000, 397, 397]


@pytest.mark.parametrize("name", ["colored-digits", "colored-mnist", "colored-mnist-irm", "rotated-mnist"])
@pytest.mark.parametrize("subset", [0, -3])
def test_an_impossible_subset_is_refused(name: str, subset: int) -> None:
    with pytest.raises(ConfigError, match=rf"subset must be at least 1 sample of each domain .*, got {subset}"):
        load_dataset(name, subset=subset)


@pytest.mark.parametrize("name", ["colored-digits", "colored-mnist", "colored-mnist-irm", "rotated-mnist"])
def test_a_negative_seed_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="seed must be at least 0, got -1"):
        load_dataset(name, seed=-1)


@pytest.mark.parametrize("name", ["colored-digits", "colored-mnist-irm"])
@pytest.mark.parametrize("label_flip", [-0.01, 0.51, float("nan")])
def test_an_impossible_label_flip_is_refused(name: str, label_flip: float) -> None:
    with pytest.raises(ConfigError, match=rf"label_flip is a probability in \[0, 0.5\], got {label_flip}"):
        load_dataset(name, label_flip=label_flip)


# The registry


def test_the_names() -> None:
    made = ["colored-digits", "colored-mnist", "colored-mnist-irm", "rotated-mnist"]
    of_images = ["domain-net", "office-home", "pacs", "terra-incognita", "vlcs"]
    assert sorted(DATASETS) == sorted(made + of_images)


def test_an_unknown_dataset_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown dataset 'color-mnist'; did you mean 'colored-mnist'"):
        load_dataset("color-mnist")


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"dataset 'colored-digits' has no option 'label_flips'; options it takes: label_flip$"
    ):
        load_dataset("colored-digits", label_flips=0.1)
    with pytest.raises(ConfigError, match=r"dataset 'rotated-mnist' has no option 'a', 'b'; options it takes: none$"):
        load_dataset("rotated-mnist", a=1, b=2)


def test_options_reach_the_dataset() -> None:
    assert same(
        load_dataset("colored-digits", seed=3, subset=50, label_flip=0.0).domains["+80%"],
        colored_digits(None, 3, 50, label_flip=0.0).domains["+80%"],
    )


def test_import_is_lazy() -> None:
    """Starting must not wait for libraries that only some datasets need."""
    program = "import sys, fishr.data; print([name for name in ('torchvision', 'sklearn') if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
