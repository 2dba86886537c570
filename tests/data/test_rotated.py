from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fishr.data import MultiDomainDataset, load_dataset
from fishr.data.mnist import LabeledImages, mnist_images
from fishr.data.rotated import rotated_mnist

ANGLES = {"0": 0, "15": 15, "30": 30, "45": 45, "60": 60, "75": 75}


def as_bytes(inputs: torch.Tensor) -> np.ndarray:
    """Images ``[sample, 28, 28]`` of 0 to 255."""
    return (inputs * 255).round().byte().squeeze(1).numpy()


@pytest.fixture(scope="module")
def pooled(data_root: Path) -> LabeledImages:
    return mnist_images(data_root).pooled()


@pytest.fixture(scope="module")
def rotated(data_root: Path) -> MultiDomainDataset:
    return rotated_mnist(data_root)


@pytest.fixture
def upright(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> MultiDomainDataset:
    """The first images of each domain before they are rotated."""
    monkeypatch.setattr("torchvision.transforms.functional.rotate", lambda images, *_: images)
    return rotated_mnist(data_root, subset=40)


def test_facts(rotated: MultiDomainDataset) -> None:
    assert (rotated.name, rotated.kind, rotated.binary) == ("rotated-mnist", "small_images", False)
    assert rotated.classes == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    assert rotated.test_domain == "0"
    assert rotated.evaluation_only == frozenset()
    assert rotated.trainable_domains == tuple(ANGLES)
    sizes = [len(samples.targets) for samples in rotated.domains.values()]
    assert sizes == [11667, 11667, 11667, 11667, 11666, 11666]
    for inputs, targets in rotated.domains.values():
        assert inputs.shape == (len(targets), 1, 28, 28)
        assert (inputs.dtype, targets.dtype) == (torch.float32, torch.int64)
        assert (inputs.min(), inputs.max()) == (0, 1)


def test_every_image_is_in_one_domain(rotated: MultiDomainDataset, pooled: LabeledImages) -> None:
    images, labels = pooled
    counts = torch.bincount(torch.cat([samples.targets for samples in rotated.domains.values()]))
    assert counts.tolist() == np.bincount(labels).tolist()
    # Shuffled: the labels of a domain are not those of every sixth file entry.
    assert rotated.domains["15"].targets.tolist() != labels[1::6].tolist()
    known = {image.tobytes() for image in images}
    found = {image.tobytes() for image in as_bytes(rotated.domains["0"].inputs)}
    assert len(found) == 11667
    assert found <= known


def test_labels_stay_with_their_images(
    rotated: MultiDomainDataset, upright: MultiDomainDataset, pooled: LabeledImages
) -> None:
    label_of = {image.tobytes(): label for image, label in zip(*pooled, strict=True)}
    for name, (images, targets) in upright.domains.items():
        assert [label_of[image.tobytes()] for image in as_bytes(images)] == targets.tolist()
        assert torch.equal(rotated.domains[name].targets[:40], targets)


def test_agrees_with_pillow(rotated: MultiDomainDataset, upright: MultiDomainDataset) -> None:
    """The published pipeline rotates with Pillow; it differs where a pixel's neighbours lie outside the image."""
    for name, (images, _) in upright.domains.items():
        turned = [
            np.array(Image.fromarray(image).rotate(ANGLES[name], Image.Resampling.BILINEAR))
            for image in as_bytes(images)
        ]
        gray_levels_apart = np.abs(as_bytes(rotated.domains[name].inputs[:40]) - np.stack(turned).astype(int))
        assert (gray_levels_apart > 1).mean() < 0.001


def test_another_seed_draws_other_images(rotated: MultiDomainDataset, data_root: Path) -> None:
    other = load_dataset("rotated-mnist", root=data_root, seed=1, subset=30)
    for domain, samples in rotated.domains.items():
        assert not torch.equal(samples.targets[:30], other.domains[domain].targets)


def test_a_subset_is_the_beginning_of_the_whole(rotated: MultiDomainDataset, data_root: Path) -> None:
    part = rotated_mnist(data_root, subset=30)
    for domain, samples in rotated.domains.items():
        assert torch.equal(part.domains[domain].inputs, samples.inputs[:30])
        assert torch.equal(part.domains[domain].targets, samples.targets[:30])
