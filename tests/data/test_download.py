"""Downloading benchmarks from a server on loopback that stands in for their sources."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fishr.data import download, fetch
from fishr.data.download import HUB_DATASETS, URLS, download_benchmark
from fishr.data.listing import BENCHMARKS, BenchmarkLayout
from fishr.errors import ConfigError, DataError
from loopback import Fault, Loopback, loopback
from small_archives import (
    HOME,
    NOISE,
    TABLE_ROWS,
    contents,
    parquet_of,
    tar_of,
    terra_annotations,
    terra_images,
    zip_of,
)

PARTS = {
    domain: {name: content + NOISE for name, content in HOME.items() if name.startswith(domain)}
    for domain in ("Art", "Real World")
}
IMAGES = {name: content for part in PARTS.values() for name, content in part.items()}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetch, "FIRST_PAUSE_SECONDS", 0.0)
    with loopback() as server:
        yield server


def install(monkeypatch: pytest.MonkeyPatch, name: str, domains: tuple[str, ...], images: int, classes: int) -> None:
    layout = BenchmarkLayout(BENCHMARKS[name].folder, domains, (images,), classes, "ask its makers")
    monkeypatch.setitem(BENCHMARKS, name, layout)  # type: ignore[arg-type]


@pytest.fixture
def root(server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root for a benchmark of two archives and a list of images to leave out."""
    install(monkeypatch, "domain-net", ("Art", "Real World"), len(IMAGES), 2)
    paths = ("/misc/duplicates.txt", "/Art.zip", "/groundtruth/Real.zip")
    monkeypatch.setattr(download, "URLS", {"domain-net": tuple(map(server.url, paths))})
    server.files["/misc/duplicates.txt"] = b"Art/Bed/twice.jpg\n"
    server.files["/Art.zip"] = zip_of(tmp_path / "1", {**PARTS["Art"], "Art/Bed/twice.jpg": b"twice"}).read_bytes()
    server.files["/groundtruth/Real.zip"] = zip_of(tmp_path / "2", PARTS["Real World"]).read_bytes()
    return tmp_path / "root"


def left(root: Path) -> list[str]:
    """What is in the folder for downloads, other than locks."""
    return sorted(path.name for path in (root / ".downloads").rglob("*") if path.suffix != ".lock")


def test_archives_are_downloaded_unpacked_and_deleted(root: Path) -> None:
    told: list[str] = []
    prepared = download_benchmark(
        "domain-net",
        root,
        on_bytes=lambda name, *_: told.append(name),
        on_files=lambda name, *_: told.append(name),
    )
    assert not prepared.was_there
    assert contents(prepared) == IMAGES
    assert list(dict.fromkeys(told)) == [
        "duplicates.txt",
        "Art.zip",
        "Real.zip",
        "reading Art.zip",
        "reading Real.zip",
        "writing domain-net",
    ]
    assert left(root) == []


def test_what_is_there_is_not_downloaded(root: Path, server: Loopback) -> None:
    download_benchmark("domain-net", root)
    server.paths.clear()
    assert download_benchmark("domain-net", root).was_there
    assert server.paths == []


def test_a_complete_one_may_lie_where_nothing_can_be_written(root: Path) -> None:
    download_benchmark("domain-net", root)
    shutil.rmtree(root / ".downloads")
    assert download_benchmark("domain-net", root).was_there
    assert not (root / ".downloads").exists()


def test_the_next_call_continues(root: Path, server: Loopback) -> None:
    server.faults += [Fault(), Fault(cut=100_000), *[Fault(status=503)] * fetch.RETRIES]
    with pytest.raises(
        DataError, match=r"Art\.zip failed 7 times in a row \(says 503 Service Unavailable\); 100,000 byt"
    ):
        download_benchmark("domain-net", root)
    assert left(root) == ["Art.zip.part", "Art.zip.tag", "domain-net", "duplicates.txt"]
    server.paths.clear()
    server.ranges.clear()
    assert contents(download_benchmark("domain-net", root)) == IMAGES
    assert server.paths == ["/Art.zip", "/groundtruth/Real.zip"]
    assert server.ranges == ["bytes=100000-", None]


def test_an_archive_cut_short_by_a_lie_is_deleted(root: Path, server: Loopback) -> None:
    server.faults += [Fault(), Fault(length=len(server.files["/Art.zip"]) // 2)]
    message = r"Art\.zip is cut off, damaged or no archive \(.*\): .*; it was deleted, call again to download it again$"
    with pytest.raises(DataError, match=message):
        download_benchmark("domain-net", root)
    assert left(root) == ["Real.zip", "domain-net", "duplicates.txt"]
    assert not (root / "domain_net").exists()
    assert contents(download_benchmark("domain-net", root)) == IMAGES


def test_wrong_counts_keep_the_archives(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "domain-net", ("Art", "Real World"), len(IMAGES) + 1, 2)
    with pytest.raises(DataError, match=r"not domain-net as published \(images: expected 9, found 8\)"):
        download_benchmark("domain-net", root)
    assert not (root / "domain_net").exists()
    assert left(root) == ["Art.zip", "Real.zip", "domain-net", "duplicates.txt"]


def test_a_folder_that_is_not_complete_is_said_before_anything_is_downloaded(root: Path, server: Loopback) -> None:
    (root / "domain_net").mkdir(parents=True)
    with pytest.raises(
        DataError, match=r"domain_net holds no folders with images.* rename or delete .*domain_net first"
    ):
        download_benchmark("domain-net", root)
    assert server.paths == []


def test_terra_incognita(server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "terra-incognita", BENCHMARKS["terra-incognita"].domains, 6, 3)
    monkeypatch.setattr(download, "URLS", {"terra-incognita": (server.url("/a.tar.gz"), server.url("/i.tar.gz"))})
    server.files["/a.tar.gz"] = tar_of(tmp_path / "1.gz", terra_annotations()).read_bytes()
    server.files["/i.tar.gz"] = tar_of(tmp_path / "2.gz", terra_images()).read_bytes()
    assert len(contents(download_benchmark("terra-incognita", tmp_path / "root"))) == 6


class TestHub:
    TABLE = "/datasets/flwrlabs/pacs/resolve/main/data/train-00000-of-00001.parquet"

    @pytest.fixture
    def root(self, server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        install(monkeypatch, "pacs", ("photo", "sketch"), 5, 2)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        table = parquet_of(tmp_path / "a.parquet", list(TABLE_ROWS), names={"label": ["dog", "house"]})
        self.serve(server, table.read_bytes())
        return tmp_path / "root"

    def serve(self, server: Loopback, content: bytes) -> None:
        name = self.TABLE.split("/main/")[1]
        lfs = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 100}
        files = [{"rfilename": "README.md", "size": 1}, {"rfilename": name, "size": len(content), "lfs": lfs}]
        info = {"id": "flwrlabs/pacs", "sha": "0" * 40, "siblings": files}
        server.files["/api/datasets/flwrlabs/pacs?blobs=true"] = json.dumps(info).encode()
        server.files[self.TABLE] = content

    def test_pacs(self, root: Path, server: Loopback) -> None:
        server.faulty_path = self.TABLE
        server.faults += [Fault(cut=500)]
        prepared = download_benchmark("pacs", root)
        assert len(contents(prepared)) == 5
        assert server.ranges[-2:] == [None, "bytes=500-"]
        assert left(root) == []

    def test_content_that_is_not_as_the_hub_says(self, root: Path, server: Loopback) -> None:
        server.files[self.TABLE] = server.files[self.TABLE][::-1]
        with pytest.raises(DataError, match=r"sent content with SHA-256 .*: call again, it starts anew"):
            download_benchmark("pacs", root)
        assert left(root) == ["pacs"]

    def test_a_hub_without_it(self, root: Path, server: Loopback) -> None:
        server.files.clear()
        with pytest.raises(
            DataError, match=r"/datasets/flwrlabs/pacs cannot be reached \(.*404.*\): check the connection"
        ):
            download_benchmark("pacs", root)

    def test_a_dataset_without_tables(self, root: Path, server: Loopback) -> None:
        info = {"id": "flwrlabs/pacs", "siblings": [{"rfilename": "README.md"}]}
        server.files["/api/datasets/flwrlabs/pacs?blobs=true"] = json.dumps(info).encode()
        with pytest.raises(DataError, match="flwrlabs/pacs has no Parquet files: the source has changed, ask there"):
            download_benchmark("pacs", root)


@pytest.mark.parametrize("name", ["vlcs", "office-home"])
def test_without_a_source_it_is_said_where_to_ask(name: str, tmp_path: Path) -> None:
    message = rf"^{name} cannot be downloaded: .*ask at github\.com/.*, then: fishr data prepare {name} ARCHIVE$"
    with pytest.raises(DataError, match=message):
        download_benchmark(name, tmp_path)


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown benchmark 'pcas'; did you mean 'pacs'"):
        download_benchmark("pcas", tmp_path)


def test_a_data_root_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/\.downloads cannot be made \(Not a directory\): name another data root"):
        download_benchmark("pacs", tmp_path / "file")


def test_every_benchmark_says_how_to_get_it() -> None:
    for name, layout in BENCHMARKS.items():
        verb = "download" if name in {*URLS, *HUB_DATASETS} else "prepare"
        assert f"fishr data {verb} {name}" in layout.source
