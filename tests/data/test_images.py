import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fishr.data import MultiDomainDataset, Samples
from fishr.data.augmentation import NUM_DRAWS, augment
from fishr.data.base import network_input
from fishr.data.cache import store_images
from fishr.data.image_format import ImageFormat
from fishr.data.images import ImageFiles, Images
from fishr.errors import DataError
from small_runs import picture

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six images of different sizes."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(6):
        picture(str(index), 9 + 2 * index).save(folder / f"{index}.png")
    return sorted(folder.iterdir())


def images_of(paths: list[Path], channels: int = 3, augmentation: str = "domainbed") -> Images:
    """The images 5, 3, 1, 0 of six."""
    return Images(ImageFiles(paths, ImageFormat(8, channels), "none", None), np.array([5, 3, 1, 0]), augmentation)


def fitted(images: Images, index: int) -> NDArray[np.uint8]:
    """The evaluation form of one of the files, ``[channel, row, column]``."""
    decoded = images.format.decode(images.files.paths[index].read_bytes())
    return images.format.fit(decoded).transpose(2, 0, 1)


def same(batch: Tensor, images: Images, indices: list[int]) -> bool:
    return np.array_equal(batch.numpy(), np.stack([fitted(images, index) for index in indices]))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_shape_is_that_of_the_evaluation_form(paths: list[Path], channels: int) -> None:
    images = images_of(paths, channels)
    assert (len(images), images.shape) == (4, (4, channels, 8, 8))
    assert images[:].shape == images.shape
    assert same(images[:], images, [5, 3, 1, 0])


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (slice(None), [5, 3, 1, 0]),
        (slice(1, 3), [3, 1]),
        (slice(2, 99), [1, 0]),
        (slice(None, None, 2), [5, 1]),
        (slice(-1, None), [0]),
        (torch.tensor([0, 1, 2, 3]), [5, 3, 1, 0]),
        (torch.tensor([3, 0, 0, 2]), [0, 5, 5, 1]),
        (torch.tensor([-1]), [0]),
        (torch.tensor([True, False, False, True]), [5, 0]),
    ],
    ids=str,
)
def test_images_are_chosen_as_those_of_a_tensor(paths: list[Path], chosen: slice | Tensor, expected: list[int]) -> None:
    images = images_of(paths)
    batch = images[chosen]
    assert batch.dtype == torch.uint8
    assert same(batch, images, expected)
    assert torch.equal(batch, images[:][chosen])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_they_lie_in_memory_with_channels_last(paths: list[Path], channels: int) -> None:
    images = images_of(paths, channels)
    draws = np.random.default_rng(0).random((4, NUM_DRAWS))
    for batch in (images[:], images.augmented(torch.arange(4), draws)):
        assert batch.permute(0, 2, 3, 1).is_contiguous()
        assert batch.is_contiguous(memory_format=torch.channels_last)


def test_a_subset_chooses_and_reads_nothing(paths: list[Path]) -> None:
    images = images_of([path.with_suffix(".gone") for path in paths])
    few = images.subset(torch.tensor([3, 1]))
    assert (len(few), few.shape, few.format, few.augmentation) == (2, (2, 3, 8, 8), images.format, "domainbed")
    assert few.indices.tolist() == [0, 3]
    assert few.subset(np.array([1])).indices.tolist() == [3]
    assert images.indices.tolist() == [5, 3, 1, 0]
    assert len(images.subset(torch.empty(0, dtype=torch.int64))) == 0


def test_a_subset_of_samples_goes_with_its_targets(paths: list[Path]) -> None:
    images = images_of(paths)
    inputs, targets = Samples(images, torch.tensor([10, 11, 12, 13])).subset(torch.tensor([2, 0]))
    assert targets.tolist() == [12, 10]
    assert same(inputs[:], images, [1, 5])
    tensors = Samples(torch.arange(8).reshape(4, 2), torch.tensor([10, 11, 12, 13])).subset(torch.tensor([2, 0]))
    assert (tensors.inputs.tolist(), tensors.targets.tolist()) == ([[4, 5], [0, 1]], [12, 10])


def test_the_training_form_is_that_of_each_image_and_its_draws(paths: list[Path]) -> None:
    images = images_of(paths)
    draws = np.random.default_rng(0).random((3, NUM_DRAWS))
    batch = images.augmented(torch.tensor([2, 0, 2]), draws)
    for image, index, row in zip(batch, (1, 5, 1), draws, strict=True):
        decoded = images.format.decode(paths[index].read_bytes())
        expected = augment(decoded, images.format, "domainbed", row)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
    assert not torch.equal(batch[0], batch[2])


def test_without_augmentation_it_is_the_evaluation_form(paths: list[Path]) -> None:
    images = images_of(paths, augmentation="none")
    draws = np.random.default_rng(0).random((4, NUM_DRAWS))
    assert torch.equal(images.augmented(torch.arange(4), draws), images[:])


# Threads


def test_images_keep_their_order_whichever_is_ready_first(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    images = images_of(paths)
    fit = ImageFormat.fit

    def slowly(format: ImageFormat, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        # Those that come first are the largest.
        time.sleep(0.002 * image.shape[0])
        return fit(format, image)

    expected = images[:]
    monkeypatch.setattr(ImageFormat, "fit", slowly)
    assert torch.equal(images[:], expected)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_number_of_threads_does_not_matter(
    threads: int, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = images_of(paths)
    draws = np.random.default_rng(0).random((4, NUM_DRAWS))
    expected = images[:], images.augmented(torch.arange(4), draws)
    with ThreadPoolExecutor(threads) as pool:
        monkeypatch.setattr("fishr.data.images._threads", lambda: pool)
        assert torch.equal(images[:], expected[0])
        assert torch.equal(images.augmented(torch.arange(4), draws), expected[1])


def test_several_threads_may_ask_at_once(paths: list[Path]) -> None:
    images = images_of(paths)
    expected = images[:]
    with ThreadPoolExecutor(8) as pool:
        batches = list(pool.map(lambda _: images[:], range(40)))
    assert all(torch.equal(batch, expected) for batch in batches)


def test_images_can_be_read_after_a_fork(paths: list[Path]) -> None:
    """A forked process has none of the threads that read images before."""
    images = images_of(paths)
    expected = images[:]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            threading.Timer(20, os._exit, [2]).start()
            code = 0 if torch.equal(images[:], expected) else 1
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# Opening


def test_files_are_opened_once_and_when_they_are_needed(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def watching(*arguments: object) -> object:
        opened.append(arguments)
        return store_images(*arguments)

    monkeypatch.setattr("fishr.data.images.store_images", watching)
    files = ImageFiles(paths, ImageFormat(8), "disk", tmp_path / "cache")
    domains = {
        name: Samples(Images(files, np.arange(start, start + 3), "light"), torch.tensor([0, 1, 1]))
        for name, start in (("x", 0), ("y", 3))
    }
    dataset = MultiDomainDataset("made", "images", domains, ("a", "b"))
    assert (dataset.input_shape, dataset.image_format) == ((3, 8, 8), ImageFormat(8))
    dataset.domains["x"].subset(torch.tensor([1]))
    assert opened == []
    told: list[tuple[int, int]] = []
    dataset.open(lambda done, total: told.append((done, total)))
    assert told[-1] == (6, 6)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: dataset.domains[name].inputs[:], "xyxyxyxy"))
    assert len(opened) == 1
    assert opened[0][:4] == (paths, ImageFormat(8), "disk", tmp_path / "cache")
    dataset.open()
    assert len(opened) == 1


def test_after_a_failure_they_are_opened_anew(paths: list[Path], tmp_path: Path) -> None:
    """Somebody may have repaired the image in between."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    files = ImageFiles([*paths, broken], ImageFormat(8), "ram", None)
    images = Images(files, np.arange(7), "none")
    with pytest.raises(DataError, match=r"^1 of 7 images cannot be read: .*broken.png \(the file is empty\)"):
        images[:]
    broken.write_bytes(paths[0].read_bytes())
    assert torch.equal(images[:][0], images[:][6])


def test_an_image_that_cannot_be_read_is_said(paths: list[Path], tmp_path: Path) -> None:
    images = images_of([*paths[:3], tmp_path / "gone.png", *paths[4:]])
    with pytest.raises(DataError, match=r"gone.png cannot be read \(the file cannot be read \(No such file or dir"):
        images[:]
    assert images[0:1].shape == (1, 3, 8, 8)


def test_a_dataset_of_tensors_needs_no_opening() -> None:
    made = MultiDomainDataset("made", "vectors", {"x": Samples(torch.zeros(2, 3), torch.tensor([0, 1]))}, ("a", "b"))
    told: list[tuple[int, int]] = []
    made.open(lambda done, total: told.append((done, total)))
    assert told == []
    assert made.image_format is None


# What a network takes


def test_bytes_become_floats_from_zero_to_one() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    inputs = network_input(levels, CPU)
    assert inputs.dtype == torch.float32
    assert torch.equal(inputs.flatten(), torch.arange(256) / 255)
    assert (inputs.min(), inputs.max()) == (0, 1)
    assert torch.equal(levels.flatten(), torch.arange(256, dtype=torch.uint8))


def test_other_inputs_stay_as_they_are() -> None:
    for inputs in (torch.randn(2, 3), torch.randn(2, 3, dtype=torch.float64)):
        assert network_input(inputs, CPU) is inputs


def test_memory_stays_as_it_is(paths: list[Path]) -> None:
    assert network_input(images_of(paths)[:], CPU).is_contiguous(memory_format=torch.channels_last)
