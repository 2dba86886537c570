"""Training images per second from the warm cache, against torchvision on PIL images from files; and the speed of
building the cache, against plain decoding. Real images: PACS, 227 by 227 pixels.
"""

import itertools
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common  # sets torch's allocator up: before torch
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from fishr.data.augmentation import NUM_DRAWS, Augmentation
from fishr.data.base import network_input
from fishr.data.cache import store_images
from fishr.data.image_format import ImageFormat
from fishr.data.images import ImageFiles, Images
from fishr.data.listing import list_benchmark
from fishr.data.mnist import data_root
from fishr.reports.tables import markdown_table

METHOD = """Each side makes the same number of batches, drawn at random, of images of 224 by 224 pixels; torchvision
reads files that the system has in memory, in a DataLoader with one worker process per core; ours reads its cache, in
threads; both end with normalised float32 unless it says otherwise. Decoding: PIL's open and convert("RGB") of the
same files in one process per core; the cache: fishr's store_images into an empty folder, digests and fsync included.
Ratio: median of the ratios of the same round, after a warm-up round."""

BATCH_SIZE = 96
CPU = torch.device("cpu")
MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
SIDES: Mapping[str, str] = {
    "torchvision": "torchvision on PIL images, from files",
    "fishr": "fishr, from the warm cache",
    "fishr-uint8": "fishr, left as uint8, as it goes to a device",
    "fishr-light": "fishr without color (light), uint8",
    "fishr-none": "fishr, evaluation form, uint8",
    "cache": "reading the cache alone",
}


class TorchvisionImages(Dataset[torch.Tensor]):
    """DomainBed's recipe (Gulrajani and Lopez-Paz, ICLR 2021) in torchvision's transforms."""

    def __init__(self, paths: Sequence[Path], size: int) -> None:
        self.paths = paths
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=(0.7, 1.0)),
                transforms.RandomHorizontalFlip(),
                transforms.ColorJitter(0.3, 0.3, 0.3, 0.3),
                transforms.RandomGrayscale(),
                transforms.ToTensor(),
                transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.paths[index]) as image:
            transformed: torch.Tensor = self.transform(image.convert("RGB"))
        return transformed


def torchvision_batches(paths: Sequence[Path], size: int, batches: int) -> Callable[[], object]:
    endless = torch.utils.data.RandomSampler(paths, replacement=True, num_samples=batches * BATCH_SIZE)
    loader = DataLoader(
        TorchvisionImages(paths, size),
        BATCH_SIZE,
        sampler=endless,
        num_workers=os.cpu_count() or 1,
        persistent_workers=True,
    )

    def make() -> int:
        return sum(len(batch) for batch in loader)

    return make


def fishr_batches(
    paths: Sequence[Path],
    image_format: ImageFormat,
    cache: Path,
    augmentation: Augmentation,
    batches: int,
    *,
    normalised: bool = False,
) -> Callable[[], object]:
    images = Images(ImageFiles(paths, image_format, "disk", cache), np.arange(len(paths)), augmentation)
    seeds = itertools.count()

    def make() -> None:
        generator = np.random.default_rng(next(seeds))
        for _ in range(batches):
            indices = torch.from_numpy(generator.integers(len(paths), size=BATCH_SIZE))
            batch = images.augmented(indices, generator.random((BATCH_SIZE, NUM_DRAWS)))
            if normalised:
                torch.addcmul(-MEAN / STD, network_input(batch, CPU), 1 / STD)  # as a backbone does

    return make


def cache_reads(
    paths: Sequence[Path], image_format: ImageFormat, cache: Path, batches: int
) -> Callable[[], NDArray[np.uint8]]:
    stored = store_images(paths, image_format, "disk", cache)
    generator = np.random.default_rng(0)

    def make() -> NDArray[np.uint8]:
        last = stored[0]
        for index in generator.integers(len(paths), size=batches * BATCH_SIZE):
            last = stored[index].copy()
        return last

    return make


def measure_batches(paths: Sequence[Path], *, size: int, batches: int, repeats: int) -> dict[str, Any]:
    image_format = ImageFormat(size)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        jobs = {
            "torchvision": torchvision_batches(paths, size, batches),
            "fishr": fishr_batches(paths, image_format, cache, "domainbed", batches, normalised=True),
            "fishr-uint8": fishr_batches(paths, image_format, cache, "domainbed", batches),
            "fishr-light": fishr_batches(paths, image_format, cache, "light", batches),
            "fishr-none": fishr_batches(paths, image_format, cache, "none", batches),
            "cache": cache_reads(paths, image_format, cache, batches),
        }
        seconds = common.time_alternating(jobs, repeats=repeats, warm_up=1)
    images = batches * BATCH_SIZE
    return {
        name: {
            "images_per_second": common.spread([images / duration for duration in values]),
            "ratio": common.spread(common.paired_ratios(seconds["torchvision"], values)),
        }
        for name, values in seconds.items()
    }


def decode(path: Path) -> None:
    with Image.open(path) as image:
        np.asarray(image.convert("RGB"))


def measure_building(paths: Sequence[Path], *, size: int, repeats: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"decode": [], "build": []}
    with multiprocessing.get_context("spawn").Pool() as pool:
        for turn in range(1 + repeats):
            # What a round has written is removed before the next, outside of what is timed.
            with tempfile.TemporaryDirectory() as folder:
                jobs: dict[str, Callable[[], object]] = {
                    "decode": partial(pool.map, decode, paths, chunksize=32),
                    "build": partial(store_images, paths, ImageFormat(size), "disk", Path(folder)),
                }
                for name in sorted(jobs, reverse=turn % 2 == 0):
                    duration = common.time_call(jobs[name])
                    if turn > 0:  # after a warm-up round
                        seconds[name].append(duration)
    return {
        name: {
            "images_per_second": common.spread([len(paths) / duration for duration in values]),
            "ratio": common.spread(common.paired_ratios(seconds["decode"], values)),
        }
        for name, values in seconds.items()
    }


def table(results: Mapping[str, Any]) -> str:
    def row(title: str, result: Mapping[str, Any]) -> list[str]:
        rate, ratio = result["images_per_second"], result["ratio"]
        return [title, f"{rate['median']:.0f}", f"{ratio['median']:.2f}", f"{ratio['q1']:.2f} to {ratio['q3']:.2f}"]

    batches = [row(title, results["batches"][name]) for name, title in SIDES.items()]
    building = [
        row("decoding alone", results["building"]["decode"]),
        row("building the cache", results["building"]["build"]),
    ]
    return "\n\n".join(
        [
            markdown_table(["training images at 224 by 224", "images/s", "over torchvision", "quartiles"], batches),
            markdown_table(["first use", "images/s", "over decoding", "quartiles"], building),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.argument_parser(__doc__, repeats=7)
    parser.add_argument("--data-root", type=Path, help="folder with PACS (default: $FISHR_DATA, else the cache folder)")
    arguments = parser.parse_args(argv)
    listing = list_benchmark("pacs", data_root(arguments.data_root))
    paths = [listing.root / path for domain in listing.domains.values() for path in domain.paths.to_pylist()]
    size, batches, built = (32, 1, 40) if arguments.quick else (224, 20, 2_000)
    chosen = paths[:: len(paths) // built]
    results = {
        "batches": measure_batches(chosen, size=size, batches=batches, repeats=arguments.repeats),
        "building": measure_building(chosen, size=size, repeats=arguments.repeats),
    }
    goals = [
        common.Goal("images/s over torchvision's", 3.0, True, results["batches"]["fishr"]["ratio"]["median"]),
        common.Goal("building over decoding", 0.7, True, results["building"]["build"]["ratio"]["median"]),
    ]
    packages = ["torch", "torchvision", "opencv-python-headless", "pillow", "numpy", "fishr"]
    setup = common.describe_setup(arguments, packages, METHOD)
    common.write_results(arguments.output, "input_pipeline", setup, results, goals, table(results))


if __name__ == "__main__":
    main()
