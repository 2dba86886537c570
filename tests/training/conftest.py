"""What the tests of training share: data, the reference runs, and a registered network with dropout."""

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from fishr.data import MultiDomainDataset, load_dataset
from fishr.training import train
from small_runs import (
    Outcome,
    noisy_registered,
    outcome,
    picture_config,
    run_config,
    small_digits,
    write_pictures,
)


@pytest.fixture(scope="session", autouse=True)
def _noisy_featurizer() -> Iterator[None]:
    with noisy_registered():
        yield


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_disks() -> Iterator[None]:
    """Forcing to disk is for power failures, not for killed processes, and takes most of a small run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def digits() -> MultiDomainDataset:
    return small_digits()


@pytest.fixture(scope="session")
def undisturbed(digits: MultiDomainDataset, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    """What one of the small runs leaves when nothing disturbs it; each is trained once."""

    @cache
    def outcome_of(name: str) -> Outcome:
        folder: Path = tmp_path_factory.mktemp("undisturbed") / name
        train(run_config(name), digits, folder, device="cpu")
        return outcome(folder)

    return outcome_of


@pytest.fixture(scope="session")
def pictures_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder DOMAIN/CLASS/image of tiny images."""
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="session")
def pictures(pictures_folder: Path) -> MultiDomainDataset:
    return load_dataset(str(pictures_folder), image_size=16, cache="ram")


@pytest.fixture(scope="session")
def undisturbed_pictures(
    pictures: MultiDomainDataset, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Outcome]:
    """The same for the small runs on images."""

    @cache
    def outcome_of(name: str) -> Outcome:
        folder: Path = tmp_path_factory.mktemp("undisturbed") / name
        train(picture_config(pictures, name), pictures, folder, device="cpu")
        return outcome(folder)

    return outcome_of
