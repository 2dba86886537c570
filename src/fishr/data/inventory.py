"""Which datasets have a name, and which of them are in a data root."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from fishr.data.listing import BENCHMARKS, list_folder, published_differences
from fishr.data.mnist import RAW_MD5, mnist_images
from fishr.data.rotated import ANGLES
from fishr.errors import DataError


class DigitsLayout(NamedTuple):
    """A dataset that is made of digits when it is loaded."""

    domains: tuple[str, ...]
    images: int
    classes: int


DIGITS = DigitsLayout(("+80%", "+90%", "-90%", "gray"), 13_394, 2)
"""Colored Digits, of scikit-learn's scans."""

MNIST_DATASETS: Mapping[str, DigitsLayout] = {
    "colored-mnist": DigitsLayout(("+90%", "+80%", "-90%"), 70_000, 2),
    "colored-mnist-irm": DigitsLayout(("+80%", "+90%", "-90%", "gray"), 70_000, 2),
    "rotated-mnist": DigitsLayout(tuple(map(str, ANGLES)), 70_000, 10),
}
"""Datasets that are made of MNIST."""


@dataclass(frozen=True)
class DatasetStatus:
    """A dataset that has a name, and what there is of it in a data root.

    Attributes:
        name: Its name.
        domains: Names of its domains, in the customary order.
        images: Numbers of images that it is known with.
        classes: Number of classes.
        state: Whether it is there as it should be, not at all, or otherwise.
        problem: What is wrong; empty for other states.
        source: How to get it.
    """

    name: str
    domains: tuple[str, ...]
    images: tuple[int, ...]
    classes: int
    state: Literal["complete", "missing", "wrong"]
    problem: str
    source: str


def dataset_statuses(root: Path) -> list[DatasetStatus]:
    """All datasets with a name; those in the data root are counted, MNIST's files are read and checked.

    Args:
        root: The data root.
    """
    state, problem = _mnist_state(root)
    statuses = [DatasetStatus("colored-digits", *_as_tuples(DIGITS), "complete", "", "it comes with scikit-learn")]
    statuses += [
        DatasetStatus(name, *_as_tuples(layout), state, problem, f"get it with: fishr data download {name}")
        for name, layout in MNIST_DATASETS.items()
    ]
    for name, benchmark in BENCHMARKS.items():
        state, problem = _benchmark_state(name, root)
        statuses.append(
            DatasetStatus(
                name, benchmark.domains, benchmark.images, benchmark.classes, state, problem, benchmark.source
            )
        )
    return statuses


def _as_tuples(layout: DigitsLayout) -> tuple[tuple[str, ...], tuple[int, ...], int]:
    return layout.domains, (layout.images,), layout.classes


def _mnist_state(root: Path) -> tuple[Literal["complete", "missing", "wrong"], str]:
    folder = root / "MNIST" / "raw"
    missing = [name for name in RAW_MD5 if not (folder / name).exists() and not (folder / f"{name}.gz").exists()]
    if len(missing) == len(RAW_MD5):
        return "missing", ""
    if missing:
        return "wrong", f"{', '.join(missing)} missing in {folder}"
    try:
        mnist_images(root)
    except DataError as error:
        return "wrong", str(error)
    return "complete", ""


def _benchmark_state(name: str, root: Path) -> tuple[Literal["complete", "missing", "wrong"], str]:
    folder = root / BENCHMARKS[name].folder
    if not folder.exists():
        return "missing", ""
    try:
        problem = "; ".join(published_differences(name, list_folder(folder)))
    except DataError as error:
        problem = str(error)
    return "wrong" if problem else "complete", problem
