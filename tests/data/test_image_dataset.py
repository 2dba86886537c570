"""Datasets of image files: a user's folder or manifest, or a benchmark by its name."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fishr.data import MultiDomainDataset, load_dataset, split_dataset
from fishr.data.image_dataset import BENCHMARK_DATASETS
from fishr.data.image_format import ImageFormat, read_image
from fishr.data.listing import BENCHMARKS
from fishr.errors import ConfigError, DataError
from fishr.models import ModelConfig
from fishr.training import RunConfig, train
from small_runs import picture, write_pictures

DOMAINS, CLASSES = ("lab", "shop", "street"), ("cat", "dog")
FORMAT = ImageFormat(8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains with two classes of four images."""
    return write_pictures(tmp_path_factory.mktemp("data") / "animals", DOMAINS, CLASSES, each=4)


def load(source: Path | str, **options: Any) -> MultiDomainDataset:
    return load_dataset(str(source), **{"image_size": 8, "cache": "none", **options})


def files_of(dataset: MultiDomainDataset, domain: str) -> list[Path]:
    inputs = dataset.domains[domain].inputs
    return [inputs.files.paths[index] for index in inputs.indices]


# Folders


def test_a_folder_is_a_dataset(folder: Path) -> None:
    dataset = load(folder)
    assert (dataset.name, dataset.kind, dataset.classes) == ("animals", "images", CLASSES)
    assert (dataset.input_shape, dataset.image_format, dataset.num_outputs) == ((3, 8, 8), FORMAT, 2)
    assert (tuple(dataset.domains), dataset.trainable_domains, dataset.test_domain) == (DOMAINS, DOMAINS, None)
    assert (dataset.fixed_out, dataset.groups) == ({}, {})
    for domain, (inputs, targets) in dataset.domains.items():
        expected = [folder / domain / name / f"{index:02}.png" for name in CLASSES for index in range(4)]
        assert files_of(dataset, domain) == expected
        assert targets.tolist() == [0] * 4 + [1] * 4
        assert targets.dtype == torch.int64
        images = np.stack([FORMAT.fit(read_image(path, FORMAT)) for path in expected])
        assert np.array_equal(inputs[:].permute(0, 2, 3, 1).numpy(), images)
        assert inputs.augmentation == "domainbed"


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_and_size_are_as_asked(folder: Path, channels: int) -> None:
    dataset = load(folder, channels=channels, image_size=5)
    assert dataset.input_shape == (channels, 5, 5)
    assert dataset.domains["shop"].inputs[:2].shape == (2, channels, 5, 5)


def test_the_published_settings_are_the_defaults(folder: Path) -> None:
    dataset = load_dataset(str(folder))
    assert dataset.input_shape == (3, 224, 224)
    assert dataset.domains["lab"].inputs.augmentation == "domainbed"
    assert dataset.domains["lab"].inputs.files.cache == "disk"


def test_no_image_is_opened_before_it_is_needed(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "animals", each=2)
    (folder / "lab/cat/00.png").write_bytes(b"no image")
    for cache in ("disk", "ram", "none"):
        dataset = load(folder, cache=cache, cache_folder=tmp_path / f"cache-{cache}")
        assert not (tmp_path / f"cache-{cache}").exists()
        with pytest.raises(DataError, match=r"lab/cat/00.png.* cannot be read|cannot be read.*lab/cat/00.png"):
            dataset.domains["lab"].inputs[:]


def test_an_image_that_cannot_be_read_leaves_no_run(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "animals")
    (folder / "street/cat/00.png").write_bytes(b"no image")
    dataset = load(folder, cache="ram")
    config = RunConfig.for_dataset(
        dataset, "erm", steps=1, test_domains=("street",), model=ModelConfig("mlp"), hparams={"batch_size": 2}
    )
    with pytest.raises(DataError, match=r"^1 of 72 images cannot be read: .*street/cat/00.png \(not an image"):
        train(config, dataset, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


# Manifests


def write_manifest(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Path:
    """Of all images, with pairs of images as groups, every second of them in the out-split."""
    rows = [
        {
            "path": f"{domain}/{name}/{index:02}.png",
            "label": name,
            "domain": domain,
            "split": "val" if index >= 2 else "train",
            "group": f"{name}-{index // 2}",
        }
        for domain in DOMAINS
        for name in CLASSES
        for index in range(4)
    ]
    return write_manifest(folder / "list.csv", rows)


def test_a_manifest_is_a_dataset(manifest: Path, folder: Path) -> None:
    dataset, of_folder = load(manifest), load(folder)
    assert (dataset.name, dataset.classes, tuple(dataset.domains)) == ("list", CLASSES, DOMAINS)
    for domain in DOMAINS:
        assert files_of(dataset, domain) == files_of(of_folder, domain)
        assert torch.equal(dataset.domains[domain].targets, of_folder.domains[domain].targets)
        assert dataset.fixed_out[domain].tolist() == [False, False, True, True] * 2
        # The same in every domain.
        assert dataset.groups[domain].tolist() == dataset.groups["lab"].tolist()
    assert len(set(dataset.groups["lab"].tolist())) == 4
    splits = split_dataset(dataset, 0.5, trial=3)
    assert all(outside.tolist() == [2, 3, 6, 7] for _, outside in splits.values())


def test_a_held_out_domain_needs_no_in_split(folder: Path, tmp_path: Path) -> None:
    rows = [
        {
            "path": str(folder / f"{domain}/{name}/{index:02}.png"),
            "label": name,
            "domain": domain,
            "split": "val" if domain == "shop" or index == 2 else "train",
        }
        for domain in DOMAINS
        for name in CLASSES
        for index in range(4)
    ]
    dataset = load(write_manifest(tmp_path / "list.csv", rows), augmentation="none")
    for held_out in ("shop", "lab"):
        config = RunConfig.for_dataset(
            dataset, "erm", steps=1, test_domains=(held_out,), model=ModelConfig("mlp"), hparams={"batch_size": 2}
        )
        if held_out == "shop":
            last = train(config, dataset, tmp_path / "run", device="cpu").records[-1]
            assert set(last.domains["shop"]) == {"in"}
        else:
            with pytest.raises(DataError, match="domain 'shop' of 'list', which is trained on, has nothing in its in-"):
                train(config, dataset, tmp_path / "other", device="cpu")


def test_a_parquet_file_is_a_manifest(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    columns = {"path": ["lab/cat/00.png", "shop/dog/00.png"], "label": ["cat", "dog"], "domain": ["lab", "shop"]}
    pa.parquet.write_table(pa.table(columns), folder / "list.parquet")
    dataset = load(folder / "list.parquet")
    assert [files_of(dataset, domain) for domain in ("lab", "shop")] == [
        [folder / "lab/cat/00.png"],
        [folder / "shop/dog/00.png"],
    ]


def test_only_groups_without_a_split_column(folder: Path) -> None:
    rows = [
        {"path": f"{domain}/cat/{index:02}.png", "label": str(index % 2), "domain": domain, "group": str(index // 2)}
        for domain in DOMAINS
        for index in range(4)
    ]
    dataset = load(write_manifest(folder / "grouped.csv", rows))
    assert (dataset.fixed_out, set(dataset.groups)) == ({}, set(DOMAINS))
    for inside, outside in split_dataset(dataset, 0.4, trial=0).values():
        assert sorted([inside.tolist(), outside.tolist()]) == [[0, 1], [2, 3]]


# Subsets


@pytest.mark.parametrize(
    ("subset", "kept"),
    [
        (1, [0]),
        (2, [0, 4]),
        (3, [0, 2, 5]),
        (4, [0, 2, 4, 6]),
        (7, [0, 1, 2, 3, 4, 5, 6]),
        (8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (99, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_a_subset_is_evenly_spread_and_all_goes_with_it(subset: int, kept: list[int], manifest: Path) -> None:
    whole, part = load(manifest), load(manifest, subset=subset)
    for domain, (inputs, targets) in part.domains.items():
        reference = whole.domains[domain]
        assert files_of(part, domain) == [files_of(whole, domain)[index] for index in kept]
        assert torch.equal(targets, reference.targets[kept])
        assert torch.equal(inputs[:], reference.inputs[torch.tensor(kept)])
        assert part.fixed_out[domain].tolist() == whole.fixed_out[domain][kept].tolist()
        assert part.groups[domain].tolist() == whole.groups[domain][kept].tolist()


def test_a_subset_is_read_alone(folder: Path) -> None:
    told: list[tuple[int, int]] = []
    load(folder, subset=3, cache="ram").open(lambda done, total: told.append((done, total)))
    assert told[-1] == (9, 9)


# What the data are named by


def test_options_tell_what_changes_a_run(folder: Path, manifest: Path) -> None:
    dataset = load(folder, subset=2)
    assert dict(dataset.options) == {
        "subset": 2,
        "image_size": 8,
        "channels": 3,
        "augmentation": "domainbed",
        "fingerprint": load(folder).options["fingerprint"],
    }
    assert re.fullmatch("[0-9a-f]{16}", dataset.options["fingerprint"])
    json.dumps(dict(dataset.options))
    assert load(manifest).options["fingerprint"] != dataset.options["fingerprint"]
    assert load(folder, augmentation="light", channels=1).options == {
        **load(folder).options,
        "augmentation": "light",
        "channels": 1,
    }


def test_options_tell_nothing_else(folder: Path, tmp_path: Path) -> None:
    """Where images lie and are kept, a seed that is not used, and how strictly they were looked at."""
    expected = load(folder).options
    moved = shutil.copytree(folder, tmp_path / "else/where/animals")
    variants = [
        load(moved),
        load(folder, cache="ram"),
        load(folder, cache="disk", cache_folder=tmp_path / "cache"),
        load(folder, seed=5),
        load(folder, strict=True),
    ]
    assert all(dataset.options == expected for dataset in variants)
    assert all(dataset.name == "animals" for dataset in variants)


def test_the_fingerprint_tells_other_images(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "animals")
    before = load(copy).options
    picture("more", 21).save(copy / "lab/cat/00.png")
    edited = load(copy).options
    (copy / "lab/cat/01.png").rename(copy / "lab/dog/10.png")
    assert len({options["fingerprint"] for options in (before, edited, load(copy).options)}) == 3


def test_a_run_names_its_images(folder: Path, tmp_path: Path) -> None:
    dataset = load(folder)
    config = RunConfig.for_dataset(dataset, "erm", steps=1, test_domains=("lab",), model=ModelConfig("mlp"))
    assert (config.data, config.data_options) == ("animals", dataset.options)
    assert RunConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config
    with pytest.raises(ConfigError, match=r"names the dataset 'animals' with .*'image_size': 8.*'image_size': 9"):
        train(config, load(folder, image_size=9), tmp_path / "run", device="cpu")


# Benchmarks


def test_benchmarks_are_datasets() -> None:
    assert set(BENCHMARK_DATASETS) == set(BENCHMARKS)


def test_pacs(data_root: Path) -> None:
    dataset = load("pacs", root=data_root, subset=5, image_size=6)
    assert (dataset.name, dataset.kind, len(dataset.classes)) == ("pacs", "images", 7)
    assert list(dataset.domains) == ["art_painting", "cartoon", "photo", "sketch"]
    for domain, (inputs, targets) in dataset.domains.items():
        assert (inputs.shape, inputs[:].shape, len(targets)) == ((5, 3, 6, 6), (5, 3, 6, 6), 5)
        # Evenly spread: of five samples hardly two are of one of the seven classes.
        assert len(set(targets.tolist())) >= 4
        for path, target in zip(files_of(dataset, domain), targets.tolist(), strict=True):
            assert path.relative_to(data_root).parts[:3] == ("PACS", domain, dataset.classes[target])
    assert dataset.options["fingerprint"] == load(data_root / "PACS").options["fingerprint"]
    sketches = dataset.domains["sketch"].inputs[:].float().mean()
    assert sketches > dataset.domains["art_painting"].inputs[:].float().mean()


def test_a_benchmark_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"^no vlcs in {tmp_path}: expected the folder {tmp_path}/VLCS with DOMAIN/CL"):
        load("vlcs", root=tmp_path)


def test_the_root_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FISHR_DATA", str(tmp_path))
    with pytest.raises(DataError, match=rf"^no vlcs in {tmp_path}: "):
        load("vlcs")


# Names and options that cannot be


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("pasc", "; did you mean 'pacs'?"),
        ("office_home", "; did you mean 'office-home'?"),
        ("./data/animls", ""),
        ("", ""),
    ],
)
def test_an_unknown_name(name: str, nearest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load(name)
    said = str(caught.value)
    assert said.startswith(f"unknown dataset {name!r}{nearest} (known: colored-digits, ")
    assert said.endswith(f", and there is no folder or manifest {name}")


def test_a_name_comes_before_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "colored-digits", each=1)
    assert load_dataset("colored-digits", subset=3).kind == "vectors"
    assert load("./colored-digits").kind == "images"


def test_a_file_that_is_no_manifest(folder: Path) -> None:
    with pytest.raises(DataError, match=r"00.png is neither a folder nor a manifest \(\.csv or \.parquet\)$"):
        load(folder / "lab/cat/00.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image size must be at least 1 pixel, got 0"),
        ({"image_size": -8}, "image size must be at least 1 pixel, got -8"),
        ({"image_size": 32.5}, "image size must be a whole number of pixels, got 32.5"),
        ({"image_size": "32"}, "image size must be a whole number of pixels, got '32'"),
        ({"image_size": True}, "image size must be a whole number of pixels, got True"),
        ({"channels": True}, "images have 1 (gray), 3 (RGB) or 4 (RGBA) channels, got True"),
        ({"channels": 3.0}, "images have 1 (gray), 3 (RGB) or 4 (RGBA) channels, got 3.0"),
        ({"channels": 2}, "images have 1 (gray), 3 (RGB) or 4 (RGBA) channels, got 2"),
        (
            {"augmentation": "domainbad"},
            "unknown augmentation 'domainbad'; did you mean 'domainbed'? (known: domainbed, light, none)",
        ),
        ({"cache": "disc"}, "unknown cache 'disc'; did you mean 'disk'? (known: disk, none, ram)"),
        ({"subset": 0}, "subset must be at least 1, got 0"),
        (
            {"size": 3},
            "dataset '{folder}' has no option 'size'; options it takes: strict, image_size, channels, augmentation, "
            "cache, cache_folder",
        ),
    ],
)
def test_an_option_that_cannot_be(options: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message.format(folder=folder))}$"):
        load(folder, **options)


def test_other_datasets_take_no_image_options() -> None:
    with pytest.raises(ConfigError, match=r"^dataset 'colored-digits' takes no image options \('augmentation'\)$"):
        load_dataset("colored-digits", augmentation="light")
    with pytest.raises(ConfigError, match=r"has no option 'augmentation', 'flip'; options it takes: label_flip$"):
        load_dataset("colored-digits", augmentation="light", flip=1)


def test_a_benchmark_knows_nothing_of_strictness() -> None:
    with pytest.raises(ConfigError, match=r"^dataset 'pacs' has no option 'strict'; options it takes: image_size, ch"):
        load("pacs", strict=True)


def test_strictness_refuses_missing_classes(tmp_path: Path, warnings_logged: Callable[[], list[str]]) -> None:
    folder = write_pictures(tmp_path / "animals", each=1)
    shutil.rmtree(folder / "shop/dog")
    assert load(folder).domains["shop"].targets.tolist() == [0]
    assert warnings_logged() == ["'animals' has no image of class 'dog' in domain 'shop'"]
    with pytest.raises(DataError, match=r"^'animals' has no image of class 'dog' in domain 'shop': expected every"):
        load(folder, strict=True)


# Paths


def test_paths_may_be_texts_and_begin_at_home(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    given = load_dataset(folder, image_size=8, cache="disk", cache_folder=str(tmp_path / "pixels"))
    home = load_dataset("~/animals", image_size=8, cache="none")
    assert files_of(given, "lab") == files_of(home, "lab")
    assert given.options == home.options
    given.domains["lab"].inputs[:2]
    assert (tmp_path / "pixels").is_dir()
    load_dataset(Path("~/animals"), image_size=8, cache_folder="~/pixels").open()
    assert (folder.parent / "pixels").is_dir()


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_that_leads_nowhere(kind: type[str] | type[Path]) -> None:
    for path in ("nowhere/at/all", "~nobody-of-this-name/images"):
        with pytest.raises(
            ConfigError, match=rf"^unknown dataset '{path}' .*, and there is no folder or manifest {path}$"
        ):
            load_dataset(kind(path))


# One domain


def test_one_domain_can_be_loaded_but_not_trained_on(tmp_path: Path) -> None:
    dataset = load(write_pictures(tmp_path / "animals", ("lab",)))
    assert len(dataset.domains["lab"].targets) == 24
    for held_out in ((), ("lab",)):
        config = RunConfig.for_dataset(dataset, "erm", steps=1, test_domains=held_out, model=ModelConfig("mlp"))
        with pytest.raises(
            DataError,
            match=r"^dataset 'animals' has 1 domain to train on or hold out \(lab\); at least 2 are needed: data from "
            "two or more places, cameras or customers$",
        ):
            train(config, dataset, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
