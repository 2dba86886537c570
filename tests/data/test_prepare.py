"""Building benchmarks from archives."""

import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from fishr.data.listing import BENCHMARKS, BenchmarkLayout
from fishr.data.prepare import alone, prepare_benchmark
from fishr.errors import ConfigError, DataError
from small_archives import (
    HOME,
    TABLE_ROWS,
    contents,
    folder_of,
    parquet_of,
    tar_of,
    terra_annotations,
    terra_images,
    zip_of,
)

Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a small benchmark in the place of a published one."""

    def install(name: str, domains: tuple[str, ...], images: int, classes: int = 2) -> None:
        layout = BenchmarkLayout(BENCHMARKS[name].folder, domains, (images,), classes, "ask its makers")
        monkeypatch.setitem(BENCHMARKS, name, layout)  # type: ignore[arg-type]

    return install


@pytest.fixture
def root(tmp_path: Path, install: Install) -> Path:
    """A data root for a benchmark as small as :data:`HOME`."""
    install("office-home", ("Art", "Real World"), len(HOME))
    return tmp_path / "root"


def below(prefix: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {prefix + name: content for name, content in files.items()}


def only_locks(root: Path) -> bool:
    return all(path.name == ".downloads" or path.suffix == ".lock" for path in root.rglob("*"))


class TestFolders:
    @pytest.mark.parametrize(
        ("make", "name"), [(zip_of, "home.zip"), (tar_of, "home.tar.gz"), (tar_of, "home.tar"), (folder_of, "home")]
    )
    @pytest.mark.parametrize("prefix", ["", "OfficeHomeDataset_10072016/", "./a/Art/b/"])
    def test_domains_lie_anywhere(self, make: Callable[..., Path], name: str, prefix: str, root: Path) -> None:
        archive = make(root.parent / name, below(prefix, HOME))
        told: list[tuple[str, int, int | None]] = []
        prepared = prepare_benchmark("office-home", [archive], root, on_files=lambda *what: told.append(what))
        assert not prepared.was_there
        assert prepared.listing.name == "office-home"
        assert prepared.listing.root == root / "office_home"
        assert contents(prepared) == HOME
        assert told[-1] == ("writing office-home", 8, 8)
        assert make is folder_of or (f"reading {name}", 8, None) in told
        assert archive.exists()

    @pytest.mark.parametrize("spelling", ["RealWorld", "real_world", "Real World"])
    def test_spellings_of_domains(self, spelling: str, root: Path) -> None:
        files = {name.replace("Real World", spelling): content for name, content in HOME.items()}
        assert contents(prepare_benchmark("office-home", [zip_of(root.parent / "a.zip", files)], root)) == HOME

    def test_an_archive_for_each_domain(self, root: Path) -> None:
        archives = [
            zip_of(root.parent / f"{domain}.zip", {name: HOME[name] for name in HOME if name.startswith(domain)})
            for domain in ("Art", "Real World")
        ]
        assert contents(prepare_benchmark("office-home", [*archives, archives[0]], root)) == HOME

    def test_what_is_no_image_stays_out(self, root: Path) -> None:
        others = (
            "ImageInfo.csv",
            "Art/Bed/Thumbs.db",
            "Art/Bed/.DS_Store",
            "Art/Bed/._1.jpg",
            "__MACOSX/Art/Bed/1.jpg",
            "Art/cover.jpg",
            "Sketch/Bed/1.jpg",
        )
        archive = zip_of(root.parent / "a.zip", {**HOME, **dict.fromkeys(others, b"other")})
        assert contents(prepare_benchmark("office-home", [archive], root)) == HOME

    def test_folders_of_splits(self, tmp_path: Path, install: Install) -> None:
        install("vlcs", ("Caltech101", "SUN09"), 5)
        files = {
            "VLCS/CALTECH/train/0/im_1.jpg": b"1",
            "VLCS/CALTECH/crossval/0/im_1.jpg": b"2",
            "VLCS/CALTECH/test/1/im_1.jpg": b"3",
            "VLCS/SUN/full/0/im_1.jpg": b"4",
            "VLCS/SUN/full/1/im_2.jpg": b"5",
            "VLCS/SUN/train/0/im_1.jpg": b"4",
            "VLCS/SUN/test/1/im_1.jpg": b"5",
        }
        assert contents(prepare_benchmark("vlcs", [tar_of(tmp_path / "a.tar", files)], tmp_path / "root")) == {
            "Caltech101/0/train_im_1.jpg": b"1",
            "Caltech101/0/crossval_im_1.jpg": b"2",
            "Caltech101/1/test_im_1.jpg": b"3",
            "SUN09/0/im_1.jpg": b"4",
            "SUN09/1/im_2.jpg": b"5",
        }

    def test_images_that_are_listed_stay_out(self, root: Path) -> None:
        twice = {**HOME, "Art/Bed/3.jpg": b"twice", "Real World/Bed/4.jpg": b"twice"}
        archive = zip_of(root.parent / "a.zip", twice)
        listed = root.parent / "duplicates.txt"
        listed.write_text("Art/Bed/3.jpg\nReal World/Bed/4.jpg\r\nArt/Bed/nowhere.jpg\n")
        with pytest.raises(DataError, match=r"images: expected 8, found 10"):
            prepare_benchmark("office-home", [archive], root)
        assert contents(prepare_benchmark("office-home", [archive, listed], root)) == HOME

    def test_images_for_one_place_are_refused(self, root: Path) -> None:
        archive = zip_of(root.parent / "a.zip", {**HOME, "copy/Art/Bed/1.jpg": b"other"})
        message = (
            r"'Art/Bed/1\.jpg' of .*a\.zip and 'copy/Art/Bed/1\.jpg' of .*a\.zip are both Art/Bed/1\.jpg: bring every"
        )
        with pytest.raises(DataError, match=message):
            prepare_benchmark("office-home", [archive], root)
        assert only_locks(root)


class TestRefusals:
    def test_other_counts_leave_nothing(self, root: Path) -> None:
        files = {name: content for name, content in HOME.items() if name != "Art/Bed/2.jpg"}
        archive = zip_of(root.parent / "a.zip", files)
        message = (
            r"a\.zip: not office-home as published \(images: expected 8, found 7\), nothing was kept; bring all of"
        )
        with pytest.raises(DataError, match=message):
            prepare_benchmark("office-home", [archive], root)
        assert only_locks(root)

    def test_nothing_of_it_in_the_archive(self, root: Path) -> None:
        archive = zip_of(root.parent / "a.zip", {"photo/dog/1.jpg": b"1"})
        message = (
            r"no image of office-home in .*a\.zip: expected DOMAIN/CLASS/image somewhere in it, the domains being Art, "
            r"Real World; found 'photo/dog/1\.jpg'"
        )
        with pytest.raises(DataError, match=message):
            prepare_benchmark("office-home", [archive], root)

    def test_hostile_archives_write_nothing(self, root: Path) -> None:
        archive = tar_of(root.parent / "a.tar", {**HOME, "../../Art/Bed/9.jpg": b"hostile"})
        before = set(root.parent.rglob("*"))
        with pytest.raises(DataError, match=r"its member '\.\./\.\./Art/Bed/9\.jpg' leads out of its folder"):
            prepare_benchmark("office-home", [archive], root)
        assert only_locks(root)
        assert {path for path in root.parent.rglob("*") if root not in (path, *path.parents)} == before

    def test_an_incomplete_folder_is_not_touched(self, root: Path) -> None:
        folder_of(root / "office_home", {"Art/Bed/1.jpg": b"mine", "Real World/Bed/1.jpg": b"mine"})
        archive = zip_of(root.parent / "a.zip", HOME)
        message = (
            r"office_home is not office-home as published \(classes: expected 2, found 1; images: .*"
            r"; to have it built anew, rename or delete .*office_home first$"
        )
        with pytest.raises(DataError, match=message):
            prepare_benchmark("office-home", [archive], root)
        assert (root / "office_home" / "Art" / "Bed" / "1.jpg").read_bytes() == b"mine"

    def test_a_complete_folder_is_left_as_it_is(self, root: Path) -> None:
        folder_of(root / "office_home", HOME)
        assert prepare_benchmark("office-home", [root / "nowhere.zip"], root).was_there

    def test_no_room(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        archive = zip_of(root.parent / "a.zip", HOME)
        needed = sum(map(len, HOME.values()))
        free = shutil.disk_usage(root.parent)._replace(free=needed - 1)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
        with pytest.raises(DataError, match=f"the images take {needed} bytes and {root} has {needed - 1} free: make"):
            prepare_benchmark("office-home", [archive], root)

    def test_unknown_names(self, root: Path) -> None:
        with pytest.raises(ConfigError, match="unknown benchmark 'officehome'; did you mean 'office-home'"):
            prepare_benchmark("officehome", [], root)

    def test_unreadable_lists(self, root: Path) -> None:
        archive = zip_of(root.parent / "a.zip", HOME)
        with pytest.raises(DataError, match=r"nowhere\.txt cannot be read as a list of images to leave out"):
            prepare_benchmark("office-home", [archive, root.parent / "nowhere.txt"], root)


def _slow_prepare(archive: Path, root: Path, layout: BenchmarkLayout) -> None:
    BENCHMARKS["office-home"] = layout  # type: ignore[index]
    prepare_benchmark(
        "office-home", [archive], root, on_files=lambda what, *_: time.sleep(10 * what.startswith("writ"))
    )


def test_a_killed_process_is_no_obstacle(root: Path) -> None:
    archive = zip_of(root.parent / "a.zip", HOME)
    child = multiprocessing.get_context("fork").Process(
        target=_slow_prepare, args=(archive, root, BENCHMARKS["office-home"])
    )
    child.start()
    deadline = time.monotonic() + 20
    while not list(root.glob(".office_home.*/*/*/*.jpg")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.kill()
    child.join()
    assert contents(prepare_benchmark("office-home", [archive], root)) == HOME
    assert not list(root.glob(".office_home.*"))


def test_two_processes_take_turns(root: Path, warnings_logged: Callable[[], list[str]]) -> None:
    archive = zip_of(root.parent / "a.zip", HOME)
    with alone("office-home", root):
        child = multiprocessing.get_context("fork").Process(
            target=prepare_benchmark, args=("office-home", [archive], root)
        )
        child.start()
        child.join(0.3)
        assert child.is_alive()
        assert not (root / "office_home").exists()
    child.join(20)
    assert child.exitcode == 0
    assert prepare_benchmark("office-home", [archive], root).was_there


class TestTerraIncognita:
    @pytest.fixture
    def root(self, tmp_path: Path, install: Install) -> Path:
        install("terra-incognita", BENCHMARKS["terra-incognita"].domains, 6, classes=3)
        return tmp_path / "root"

    def test_images_go_into_every_class_they_have(self, root: Path) -> None:
        archives = [
            tar_of(root.parent / "images.tar.gz", terra_images()),
            tar_of(root.parent / "annotations.tar.gz", terra_annotations()),
        ]
        assert contents(prepare_benchmark("terra-incognita", archives, root)) == {
            "location_38/dog/a.jpg": b"a",
            "location_38/dog/b.jpg": b"b",
            "location_38/bird/b.jpg": b"b",
            "location_100/empty/c.jpg": b"c",
            "location_43/empty/d.jpg": b"d",
            "location_46/dog/e.jpg": b"e",
        }

    def test_images_that_are_missing(self, root: Path) -> None:
        folder = folder_of(root.parent / "unpacked", {**terra_images("b"), **terra_annotations()})
        with pytest.raises(DataError, match=r"2 of 6 annotated images are in no archive, such as 'b\.jpg': bring the"):
            prepare_benchmark("terra-incognita", [folder], root)

    @pytest.mark.parametrize("content", [b"{", b"[]", b'{"categories": []}', b'{"categories": [{"id": 1}]}', b"\xff"])
    def test_other_files_are_no_annotations(self, content: bytes, root: Path) -> None:
        archive = zip_of(root.parent / "a.zip", {"notes.json": content, **terra_images()})
        with pytest.raises(
            DataError, match=r"'notes\.json' of .*a\.zip is no annotation file \(.*\): expected JSON with"
        ):
            prepare_benchmark("terra-incognita", [archive], root)

    def test_paths_in_annotations_lead_nowhere(self, root: Path) -> None:
        hostile = json.loads(terra_annotations()["eccv/train_annotations.json"])
        for image in hostile["images"]:
            image["file_name"] = "../../../" + image["file_name"]
        files = {"train.json": json.dumps(hostile).encode(), **terra_images()}
        prepared = prepare_benchmark("terra-incognita", [zip_of(root.parent / "a.zip", files)], root)
        assert len(contents(prepared)) == 6


class TestParquet:
    @pytest.fixture
    def root(self, tmp_path: Path, install: Install) -> Path:
        install("pacs", ("photo", "sketch"), 5)
        return tmp_path / "root"

    @pytest.mark.parametrize("domains_are_numbers", [False, True])
    def test_images_are_written_as_they_are(self, domains_are_numbers: bool, root: Path) -> None:
        rows, names = list(TABLE_ROWS), {"label": ["dog", "house"]}
        if domains_are_numbers:
            names["domain"] = ["sketch", "photo"]
            rows = [(image, names["domain"].index(domain), label) for image, domain, label in rows]
        told: list[tuple[str, int, int | None]] = []
        table = parquet_of(root.parent / "a.parquet", rows, names=names)
        prepared = prepare_benchmark("pacs", [table], root, on_files=lambda *what: told.append(what))
        assert contents(prepared) == {
            "photo/dog/pic_1.png": b"\x89PNG 1",
            "photo/dog/000002.jpg": b"\xff\xd8 2",
            "photo/house/000003.jpg": b"\xff\xd8 3",
            "sketch/house/000004.png": b"\x89PNG 4",
            "sketch/dog/pic_5.jpg": b"\xff\xd8 5",
        }
        assert told[-1] == ("writing pacs", 5, 5)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (
                ((b"1", None), "cartoon", "dog"),
                r"row 2 of .* has domain 'cartoon' and label 'dog': expected one of the d",
            ),
            (((b"1", None), "photo", "../dog"), r"row 2 of .* has domain 'photo' and label '\.\./dog'"),
            (((b"1", None), "photo", None), r"row 2 of .* has no label|label 'None'|images: expected"),
            ((None, "photo", "dog"), r"row 2 of .* has no image: expected the bytes of its file; get the table again"),
        ],
    )
    def test_rows_that_are_wrong(self, row: tuple[Any, Any, Any], message: str, root: Path) -> None:
        table = parquet_of(root.parent / "a.parquet", [((b"1", None), "photo", "dog"), row])
        with pytest.raises(DataError, match=message):
            prepare_benchmark("pacs", [table], root)
        assert only_locks(root)

    def test_other_tables(self, root: Path) -> None:
        pyarrow.parquet.write_table(pa.table({"image": ["a"], "label": [1]}), root.parent / "a.parquet")
        with pytest.raises(DataError, match=r"a\.parquet has the columns image, label: expected image, domain, label"):
            prepare_benchmark("pacs", [root.parent / "a.parquet"], root)

    @pytest.mark.parametrize("content", [b"", b"PAR1 nothing PAR1"])
    def test_damaged_tables(self, content: bytes, root: Path) -> None:
        (root.parent / "a.parquet").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.parquet is cut off, damaged or no archive"):
            prepare_benchmark("pacs", [root.parent / "a.parquet"], root)

    def test_missing_tables(self, root: Path) -> None:
        with pytest.raises(DataError, match=r"nowhere\.parquet"):
            prepare_benchmark("pacs", [root.parent / "nowhere.parquet"], root)


def test_real_pacs_as_it_is_published(data_root: Path, tmp_path: Path, install: Install) -> None:
    """A part of it, in the layout of its zip archive."""
    if not (data_root / "PACS").is_dir():
        pytest.skip(f"no PACS in {data_root}")
    domains = BENCHMARKS["pacs"].domains
    files = {
        f"kfold/{path.relative_to(data_root / 'PACS').as_posix()}": path.read_bytes()
        for domain in domains
        for name in ("dog", "house")
        for path in sorted((data_root / "PACS" / domain / name).iterdir())[:3]
    }
    install("pacs", domains, len(files))
    prepared = prepare_benchmark("pacs", [zip_of(tmp_path / "PACS.zip", files)], tmp_path / "root")
    assert below("kfold/", contents(prepared)) == files
