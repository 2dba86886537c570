"""What is said of datasets with a name is true of them."""

from pathlib import Path

import pytest

from fishr.data import DATASETS, load_dataset
from fishr.data.inventory import DIGITS, MNIST_DATASETS, dataset_statuses
from fishr.data.listing import BENCHMARKS, BenchmarkLayout
from small_archives import folder_of


def test_all_names_are_there(tmp_path: Path) -> None:
    statuses = dataset_statuses(tmp_path)
    assert {status.name for status in statuses} >= {"colored-digits", *MNIST_DATASETS, *BENCHMARKS}
    assert all(status.name in DATASETS for status in statuses)
    assert [status.name for status in statuses if status.state != "missing"] == ["colored-digits"]
    assert all(status.source for status in statuses)


def test_colored_digits() -> None:
    dataset = load_dataset("colored-digits")
    assert tuple(dataset.domains) == DIGITS.domains
    assert sum(len(part.targets) for part in dataset.domains.values()) == DIGITS.images
    assert len(dataset.classes) == DIGITS.classes


@pytest.mark.parametrize("name", MNIST_DATASETS)
def test_datasets_made_of_mnist(name: str, data_root: Path) -> None:
    whole = name != "rotated-mnist"  # which takes seconds to rotate
    dataset = load_dataset(name, root=data_root, subset=None if whole else 10)
    assert tuple(dataset.domains) == MNIST_DATASETS[name].domains
    assert len(dataset.classes) == MNIST_DATASETS[name].classes
    if whole:
        assert sum(len(part.targets) for part in dataset.domains.values()) == MNIST_DATASETS[name].images


def test_real_data_are_complete(data_root: Path) -> None:
    states = {status.name: (status.state, status.problem) for status in dataset_statuses(data_root)}
    assert states["rotated-mnist"] == ("complete", "")
    if (data_root / "PACS").is_dir():
        assert states["pacs"] == ("complete", "")


def test_what_is_wrong_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = BenchmarkLayout("PACS", ("A", "B"), (4,), 1, "ask its makers")
    monkeypatch.setitem(BENCHMARKS, "pacs", layout)  # type: ignore[arg-type]
    folder_of(tmp_path / "PACS", {f"{domain}/cat/1.jpg": b"" for domain in "AB"})
    (tmp_path / "VLCS").mkdir()
    raw = folder_of(tmp_path / "MNIST" / "raw", {"train-images-idx3-ubyte.gz": b""})
    states = {status.name: (status.state, status.problem) for status in dataset_statuses(tmp_path)}
    assert states["pacs"] == ("wrong", "images: expected 4, found 2")
    assert states["vlcs"] == ("wrong", f"{tmp_path / 'VLCS'} holds no folders with images: expected DOMAIN/CLASS/image")
    assert states["colored-mnist"][0] == "wrong"
    assert states["colored-mnist"][1].endswith(f"t10k-labels-idx1-ubyte missing in {raw}")


def test_damaged_mnist(tmp_path: Path) -> None:
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    folder_of(tmp_path / "MNIST" / "raw", {f"{name}-ubyte": b"damaged" for name in names})
    states = {status.name: (status.state, status.problem) for status in dataset_statuses(tmp_path)}
    assert states["rotated-mnist"][0] == "wrong"
    assert "has content with md5" in states["rotated-mnist"][1]
