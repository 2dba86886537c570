"""What the tests of training share: data, the reference runs, and a registered network with dropout."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fishr.data import MultiDomainDataset
from fishr.training import train
from small_runs import Outcome, noisy_registered, outcome, run_config, small_digits


@pytest.fixture(scope="session", autouse=True)
def _noisy_featurizer() -> Iterator[None]:
    with noisy_registered():
        yield


@pytest.fixture(scope="session")
def digits() -> MultiDomainDataset:
    return small_digits()


@pytest.fixture(scope="session")
def undisturbed(digits: MultiDomainDataset, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    """What one of the small runs leaves when nothing disturbs it; each is trained once."""
    known: dict[str, Outcome] = {}

    def outcome_of(name: str) -> Outcome:
        if name not in known:
            folder: Path = tmp_path_factory.mktemp("undisturbed") / name
            train(run_config(name), digits, folder, device="cpu")
            known[name] = outcome(folder)
        return known[name]

    return outcome_of
