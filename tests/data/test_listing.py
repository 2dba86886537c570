import csv
import os
import re
import shutil
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from fishr.data import listing as listing_module
from fishr.data.listing import (
    BENCHMARKS,
    IMAGE_SUFFIXES,
    BenchmarkLayout,
    ImageListing,
    file_sizes,
    fingerprint,
    list_benchmark,
    list_folder,
    read_manifest,
)
from fishr.errors import ConfigError, DataError

Warnings = Callable[[], list[str]]


def tree(root: Path, *files: str) -> Path:
    """Empty files, with the folders they need."""
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def two_domains(root: Path) -> Path:
    return tree(root, *(f"{domain}/{name}/1.jpg" for domain in ("photo", "sketch") for name in ("cat", "dog")))


def contents(listing: ImageListing) -> dict[str, list[tuple[str, str]]]:
    """Path and class of every image."""
    return {
        name: [
            (path, listing.classes[label])
            for path, label in zip(part.paths.to_pylist(), part.labels.tolist(), strict=True)
        ]
        for name, part in listing.domains.items()
    }


def write(path: Path, columns: Mapping[str, Sequence[Any]]) -> Path:
    """A manifest of the kind that the ending says."""
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.table(dict(columns)), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([columns, *zip(*columns.values(), strict=True)])
    return path


def rows(**changes: Sequence[Any]) -> dict[str, Sequence[Any]]:
    """Columns of a manifest of four images."""
    return {
        "path": ["a.png", "b.png", "c.png", "d.png"],
        "label": ["cat", "dog", "cat", "dog"],
        "domain": ["photo", "photo", "sketch", "sketch"],
    } | changes


ENDINGS = pytest.mark.parametrize("ending", [".csv", ".parquet"])


def row(number: int, ending: str) -> int:
    """What messages call a row, counted from 1 below the header."""
    return number + 1 if ending == ".csv" else number


class TestFolder:
    def test_domains_classes_and_images_are_sorted(self, tmp_path: Path) -> None:
        root = tree(tmp_path, "b/dog/2.jpg", "b/dog/10.jpg", "b/cat/x.png", "A/dog/1.jpg", "A/cat/1.jpg", "é/cat/1.jpg")
        tree(root, "é/dog/1.jpg", "Z/cat/1.jpg", "Z/dog/1.jpg")
        listing = list_folder(root)
        assert (listing.name, listing.root, listing.classes) == (tmp_path.name, tmp_path, ("cat", "dog"))
        assert list(listing.domains) == ["A", "Z", "b", "é"]
        assert contents(listing)["b"] == [("b/cat/x.png", "cat"), ("b/dog/10.jpg", "dog"), ("b/dog/2.jpg", "dog")]
        part = listing.domains["b"]
        assert part.paths.type == pa.string()
        assert part.labels.dtype == np.int64
        assert part.out is None
        assert part.groups is None

    def test_every_image_ending_counts_in_any_case(self, tmp_path: Path, warnings_logged: Warnings) -> None:
        root = two_domains(tmp_path)
        names = [*sorted(f"x{suffix}" for suffix in IMAGE_SUFFIXES), "y.JPG", "z.Tiff"]
        tree(root, *(f"photo/cat/{name}" for name in names))
        found = [Path(path).name for path, name in contents(list_folder(root))["photo"] if name == "cat"]
        assert found == ["1.jpg", *names]
        assert not warnings_logged()

    def test_deeper_folders_belong_to_the_class(self, tmp_path: Path) -> None:
        root = tree(two_domains(tmp_path), "photo/cat/deep/er/2.jpg", "photo/cat/a.jpg", "photo/cat a/1.jpg")
        tree(root, "sketch/cat a/1.jpg")
        assert contents(list_folder(root))["photo"] == [
            ("photo/cat a/1.jpg", "cat a"),
            ("photo/cat/1.jpg", "cat"),
            ("photo/cat/a.jpg", "cat"),
            ("photo/cat/deep/er/2.jpg", "cat"),
            ("photo/dog/1.jpg", "dog"),
        ]

    def test_hidden_and_junk_is_passed_over_in_silence(self, tmp_path: Path, warnings_logged: Warnings) -> None:
        root = two_domains(tmp_path)
        before = contents(list_folder(root))
        tree(root, ".DS_Store", ".cache/cat/1.jpg", "__MACOSX/photo/cat/._1.jpg", "photo/.hidden/1.jpg")
        tree(root, "photo/cat/._1.jpg", "photo/cat/Thumbs.db", "desktop.ini", "sketch/__MACOSX/1.jpg")
        assert contents(list_folder(root)) == before
        assert not warnings_logged()

    def test_other_files_are_counted_in_a_warning(self, tmp_path: Path, warnings_logged: Warnings) -> None:
        root = tree(two_domains(tmp_path), "README.txt", "photo/list.csv", "sketch/dog/deep/1.svg")
        assert sum(map(len, contents(list_folder(root)).values())) == 4
        assert warnings_logged() == [f"{root}: left out 3 files without the ending of an image, such as 'README.txt'"]

    def test_images_outside_of_class_folders_are_counted_in_a_warning(
        self, tmp_path: Path, warnings_logged: Warnings
    ) -> None:
        root = tree(two_domains(tmp_path), "overview.png", "photo/sheet.png")
        assert sum(map(len, contents(list_folder(root)).values())) == 4
        assert warnings_logged() == [f"{root}: left out 2 images outside of class folders, such as 'overview.png'"]

    def test_links_are_followed(self, tmp_path: Path) -> None:
        elsewhere = tree(tmp_path / "elsewhere", "cat/1.jpg", "dog/1.jpg", "dog/2.jpg")
        root = two_domains(tmp_path / "data")
        (root / "linked").symlink_to(elsewhere)
        (root / "photo" / "cat" / "2.jpg").symlink_to(elsewhere / "dog" / "2.jpg")
        (root / "sketch" / "cat" / "more").symlink_to(elsewhere / "cat")
        found = contents(list_folder(root))
        assert found["linked"] == [
            ("linked/cat/1.jpg", "cat"),
            ("linked/dog/1.jpg", "dog"),
            ("linked/dog/2.jpg", "dog"),
        ]
        assert ("photo/cat/2.jpg", "cat") in found["photo"]
        assert ("sketch/cat/more/1.jpg", "cat") in found["sketch"]

    def test_loops_end(self, tmp_path: Path) -> None:
        root = two_domains(tmp_path)
        before = contents(list_folder(root))
        (root / "again").symlink_to(root)
        (root / "photo" / "again").symlink_to(root / "photo")
        (root / "photo" / "cat" / "up").symlink_to(root)
        (root / "sketch" / "dog" / "deep").mkdir()
        (root / "sketch" / "dog" / "deep" / "up").symlink_to(root / "sketch")
        (root / "sketch" / "dog" / "self").symlink_to(root / "sketch" / "dog" / "self")
        assert contents(list_folder(root)) == before

    def test_a_broken_link_is_an_image_that_is_missing(self, tmp_path: Path) -> None:
        root = two_domains(tmp_path)
        (root / "photo" / "cat" / "2.jpg").symlink_to(root / "nowhere.jpg")
        (root / "photo" / "cat" / "3.jpg").symlink_to(root / "photo" / "cat" / "3.jpg")
        listing = list_folder(root)
        assert len(listing.domains["photo"].labels) == 4
        with pytest.raises(DataError, match=r"2 of 6 images .*\('photo/cat/2.jpg', 'photo/cat/3.jpg'\)"):
            file_sizes(listing)

    def test_names_of_all_kinds(self, tmp_path: Path) -> None:
        files = [f"Real World/{name}/ü {name} ☃.jpg" for name in ("chien méchant", "猫")]
        assert contents(list_folder(tree(tmp_path, *files))) == {
            "Real World": [(files[0], "chien méchant"), (files[1], "猫")]
        }

    @pytest.mark.parametrize("level", ["", "photo", "photo/cat", "photo/cat/deep"])
    @pytest.mark.parametrize("kind", ["file", "folder"])
    def test_a_name_that_is_no_utf8_is_refused(self, tmp_path: Path, level: str, kind: str) -> None:
        folder = tree(two_domains(tmp_path), "photo/cat/deep/1.jpg") / level
        path = os.path.join(os.fsencode(folder), b"caf\xe9.jpg")  # noqa: PTH118
        try:
            if kind == "folder":
                os.mkdir(path)  # noqa: PTH102
            else:
                os.close(os.open(path, os.O_CREAT))
        except OSError:
            pytest.skip("the file system takes UTF-8 alone")
        message = rf"the name b'caf\\xe9.jpg' in {re.escape(str(folder))} is no UTF-8: rename it"
        with pytest.raises(DataError, match=message):
            list_folder(tmp_path)

    def test_one_domain_is_enough(self, tmp_path: Path) -> None:
        assert list(list_folder(tree(tmp_path, "new/cat/1.jpg", "new/dog/1.jpg")).domains) == ["new"]

    def test_relative_paths_and_the_home_folder_are_made_absolute(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        two_domains(tmp_path / "data")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert list_folder(Path("data")).root == list_folder(Path("~/data")).root == tmp_path / "data"

    def test_missing_classes_are_told_in_one_warning(self, tmp_path: Path, warnings_logged: Warnings) -> None:
        root = tree(tmp_path / "pets", "a/cat/1.jpg", "a/dog/1.jpg", "b/cat/1.jpg", "b/emu/1.jpg")
        assert list_folder(root).classes == ("cat", "dog", "emu")
        message = "'pets' has no image of class 'emu' in domain 'a', 'dog' in domain 'b'"
        assert warnings_logged() == [message]
        with pytest.raises(DataError, match=f"^{message}: expected every class in every domain"):
            list_folder(root, strict=True)

    def test_five_missing_classes_are_named(self, tmp_path: Path, warnings_logged: Warnings) -> None:
        list_folder(tree(tmp_path, *(f"a/{name}/1.jpg" for name in "stuvwxy"), "b/s/1.jpg"))
        (message,) = warnings_logged()
        assert message.endswith(
            "'t' in domain 'b', " + ", ".join(f"{n!r} in domain 'b'" for n in "uvwx") + " and 1 more"
        )

    def test_a_class_folder_without_images_is_a_missing_class(self, tmp_path: Path, warnings_logged: Warnings) -> None:
        root = two_domains(tmp_path / "pets")
        (root / "photo" / "cat" / "1.jpg").unlink()
        tree(root, "sketch/emu/notes.txt")
        assert list_folder(root).classes == ("cat", "dog")
        assert warnings_logged()[-1] == (
            "'pets' has no image of class 'cat' in domain 'photo', 'emu' in domain 'photo', 'emu' in domain 'sketch'"
        )

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ([], "{root} holds no folders with images: expected DOMAIN/CLASS/image"),
            (["1.jpg"], "{root} holds images but no folders: expected DOMAIN/CLASS/image"),
            (
                ["dog/2.jpg", "cat/1.jpg"],
                "{root} looks like CLASS/image (such as 'cat/1.jpg'): expected DOMAIN/CLASS/image; put the class "
                "folders of each domain into a folder of its own",
            ),
            (
                ["a/cat/1.jpg", "a/dog/1.jpg", "b/notes.txt"],
                "no images in class folders of 'b' in {root}: expected DOMAIN/CLASS/image; fill the folder, or move",
            ),
            (
                ["a/cat/1.jpg", "a/dog/1.jpg", "b/1.jpg", "c/cat/notes.txt"],
                "no images in class folders of 'b', 'c' in {root}: expected DOMAIN/CLASS/image; fill the folders, or",
            ),
        ],
    )
    def test_other_layouts_are_refused(self, tmp_path: Path, files: list[str], message: str) -> None:
        tree(tmp_path, *files)
        with pytest.raises(DataError, match=re.escape(message.format(root=tmp_path))):
            list_folder(tmp_path)

    def test_no_folder_is_refused(self, tmp_path: Path) -> None:
        tree(tmp_path, "file")
        for name, reason in (("nowhere", "No such file or directory"), ("file", "Not a directory")):
            with pytest.raises(
                DataError, match=rf"{name} cannot be listed \({reason}\): expected a folder with DOMAIN"
            ):
                list_folder(tmp_path / name)


class TestManifest:
    @ENDINGS
    def test_rows_become_domains(self, tmp_path: Path, ending: str) -> None:
        path = write(
            tmp_path / f"pets{ending}",
            {
                "note": ["x", "y", "z", "", ""],
                "domain": ["sketch", "Photo", "sketch", "Photo", "sketch"],
                "path": ["s/b.png", "/far/a.png", "s/a.png", "p/é ü.png", "t.png"],
                "label": ["dog", "cat", "emu", "dog", "cat"],
            },
        )
        listing = read_manifest(path)
        assert (listing.name, listing.root, listing.classes) == ("pets", tmp_path, ("cat", "dog", "emu"))
        assert list(contents(listing).items()) == [
            ("Photo", [("/far/a.png", "cat"), ("p/é ü.png", "dog")]),
            ("sketch", [("s/a.png", "emu"), ("s/b.png", "dog"), ("t.png", "cat")]),
        ]
        part = listing.domains["sketch"]
        assert part.paths.type == pa.string()
        assert part.labels.dtype == np.int64
        assert part.out is None
        assert part.groups is None

    def test_the_order_of_rows_does_not_matter(self, tmp_path: Path) -> None:
        columns = rows(split=["train", "val", "in", "out"], group=["x", "", "x", "y"])
        first = read_manifest(write(tmp_path / "a.csv", columns))
        turned = read_manifest(write(tmp_path / "b.csv", {name: values[::-1] for name, values in columns.items()}))
        sizes = {"photo": np.arange(2), "sketch": np.arange(2)}
        assert contents(first) == contents(turned)
        assert fingerprint(first, sizes) == fingerprint(turned, sizes)

    @ENDINGS
    def test_labels_and_domains_are_text(self, tmp_path: Path, ending: str) -> None:
        columns = rows(label=["007", "7", "NA", "null"], domain=["01", "01", "1", "nan"])
        listing = read_manifest(write(tmp_path / f"x{ending}", columns))
        assert listing.classes == ("007", "7", "NA", "null")
        assert list(listing.domains) == ["01", "1", "nan"]

    @pytest.mark.parametrize(
        "labels",
        [
            pa.array([10, 2, 10, 2]),
            pa.array([10, 2, 10, 2], pa.uint8()),
            pa.array([10, 2, 10, 2]).dictionary_encode(),
            pa.array(["10", "2", "10", "2"], pa.large_string()),
            pa.array(["10", "2", "10", "2"]).dictionary_encode(),
            pa.DictionaryArray.from_arrays(pa.array([1, 2, 1, 2], pa.int8()), ["unused", "10", "2"]),
        ],
        ids=lambda labels: str(labels.type),
    )
    def test_types_of_parquet(self, tmp_path: Path, labels: pa.Array) -> None:
        listing = read_manifest(write(tmp_path / "x.parquet", rows(label=labels)))
        assert listing.classes == ("10", "2")
        assert listing.domains["photo"].labels.tolist() == [0, 1]

    @pytest.mark.parametrize(
        ("column", "values", "message"),
        [
            ("label", [1.0, 2.0, 1.0, 2.0], "column 'label' of .* has the type double: expected text or whole numbers"),
            ("domain", [b"a", b"a", b"b", b"b"], "column 'domain' of .* has the type binary: expected text or whole"),
            ("path", [1, 2, 3, 4], "column 'path' of .* has the type int64: expected text; convert"),
        ],
    )
    def test_other_types_are_refused(self, tmp_path: Path, column: str, values: list[Any], message: str) -> None:
        with pytest.raises(DataError, match=message):
            read_manifest(write(tmp_path / "x.parquet", rows(**{column: values})))

    def test_parquet_in_several_row_groups(self, tmp_path: Path) -> None:
        path = tmp_path / "x.PARQUET"
        pa.parquet.write_table(pa.table(rows(group=["x", "y", "y", "x"])), path, row_group_size=1)
        listing = read_manifest(path)
        assert contents(listing)["sketch"] == [("c.png", "cat"), ("d.png", "dog")]
        assert listing.domains["sketch"].groups.tolist() == [1, 0]

    @pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\r\n"], ids=["plain", "byte order mark", "empty line"])
    def test_forms_of_csv(self, tmp_path: Path, start: bytes) -> None:
        path = tmp_path / "x.CSV"
        content = 'path,label,domain\r\n"a, ""1"".png",cat,é\r\n\r\n"b\nb.png","dog",é'
        path.write_bytes(start + content.encode())
        assert contents(read_manifest(path)) == {"é": [('a, "1".png', "cat"), ("b\nb.png", "dog")]}

    def test_quoted_line_breaks_where_csv_is_cut_into_blocks(self, tmp_path: Path) -> None:
        paths = [f"{index:06d}\n{'x' * 57}" for index in range(60_000)]
        columns = {"path": paths, "label": ["cat", "dog"] * 30_000, "domain": ["photo"] * 60_000}
        assert read_manifest(write(tmp_path / "x.csv", columns)).domains["photo"].paths.to_pylist() == paths

    @pytest.mark.parametrize(
        ("encoding", "text"),
        [
            ("latin-1", "path,label,domain,é\na.png,cat,photo,x\n"),
            ("latin-1", "path,label,domain\n" + "a.png,cat,photo\n" * 100_000 + "é.png,cat,photo\n"),
            ("utf-16", "path,label,domain\na.png,cat,photo\n"),
        ],
        ids=["header", "far down", "utf-16"],
    )
    def test_other_encodings_are_refused(self, tmp_path: Path, encoding: str, text: str) -> None:
        path = tmp_path / "x.csv"
        path.write_text(text, encoding=encoding)
        with pytest.raises(DataError, match=r"x\.csv is no UTF-8 text.*: save it with the encoding UTF-8"):
            read_manifest(path)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            (
                "x.csv",
                b"",
                r"lacks the columns 'path', 'label', 'domain': found none; expected path, label, domain and",
            ),
            (
                "x.csv",
                b"path,label,domain\n",
                r"has no rows: expected one for each image, with the columns path, label",
            ),
            (
                "x.csv",
                b"path,label,domain\na,b,c\na,b\n",
                r"cannot be read as csv \(.*Row #3: Expected 3 columns, got 2",
            ),
            ("x.csv", b'path,label,domain\n"a\nb,u,x\n', r"cannot be read as csv \(.*Expected 3 columns"),
            ("x.csv", b"path;label;domain\na;b;c\n", r"lacks .*: found 'path;label;domain'; expected path, label"),
            ("x.parquet", b"path,label,domain\na,b,c\n", r"cannot be read as parquet \(.*\): expected a table"),
            ("x.parquet", b"", r"cannot be read as parquet \(.*\): expected a table"),
            ("x.tsv", b"", r"ends in '.tsv': expected a manifest that ends in .csv or .parquet"),
        ],
    )
    def test_other_files_are_refused(self, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"^{re.escape(str(path))} {message}") as caught:
            read_manifest(path)
        assert "\n" not in str(caught.value)

    @ENDINGS
    def test_missing_files_and_folders_are_refused(self, tmp_path: Path, ending: str) -> None:
        with pytest.raises(
            DataError, match=rf"x\{ending} cannot be read \(No such file or directory\): name a manifest"
        ):
            read_manifest(tmp_path / f"x{ending}")
        (tmp_path / f"y{ending}").mkdir()
        with pytest.raises(DataError, match=rf"y\{ending} cannot be read \(Is a directory\)"):
            read_manifest(tmp_path / f"y{ending}")

    @ENDINGS
    def test_missing_columns_are_named(self, tmp_path: Path, ending: str) -> None:
        path = write(tmp_path / f"x{ending}", {"Path": ["a"], "labels": ["b"], "size": ["c"]})
        with pytest.raises(
            DataError,
            match=re.escape(
                f"{path} lacks the columns 'path' (called 'Path'?), 'label' (called 'labels'?), 'domain': found "
                "'Path', 'labels', 'size'; expected path, label, domain and, if wanted, split, group"
            ),
        ):
            read_manifest(path)

    def test_a_column_that_stands_there_twice_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "x.csv"
        path.write_text("path,label,domain,label\na,b,c,d\n")
        with pytest.raises(DataError, match=r"has the column 'label' 2 times: expected it once"):
            read_manifest(path)

    @ENDINGS
    def test_near_misses_of_optional_columns_are_told(
        self, tmp_path: Path, warnings_logged: Warnings, ending: str
    ) -> None:
        columns = rows(splits=["x"] * 4, Group=["y"] * 4, patient=["z"] * 4, width=["1"] * 4)
        path = write(tmp_path / f"x{ending}", columns)
        listing = read_manifest(path)
        assert listing.domains["photo"].out is None
        assert warnings_logged() == [
            f"{path}: column 'splits' is ignored; if it is meant, call it 'split'",
            f"{path}: column 'Group' is ignored; if it is meant, call it 'group'",
        ]

    def test_no_near_miss_beside_the_column_itself(self, tmp_path: Path, warnings_logged: Warnings) -> None:
        read_manifest(write(tmp_path / "x.csv", rows(split=["in"] * 4, splits=["x"] * 4)))
        assert not warnings_logged()

    @ENDINGS
    @pytest.mark.parametrize("column", ["path", "label", "domain", "split"])
    @pytest.mark.parametrize("empty", ["", " ", None])
    def test_empty_cells_are_refused(self, tmp_path: Path, ending: str, column: str, empty: str | None) -> None:
        values = list(rows(split=["train"] * 4)[column])
        path = write(tmp_path / f"x{ending}", rows(split=["train"] * 4) | {column: [*values[:2], empty, values[3]]})
        message = f"column {column!r} of {path} is empty in row {row(3, ending)}: expected a text in every row"
        with pytest.raises(DataError, match=re.escape(message)):
            read_manifest(path)

    def test_a_column_of_nulls_is_empty(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.parquet", rows(label=pa.nulls(4)))
        with pytest.raises(DataError, match=r"'label' of .* is empty in rows 1, 2, 3 and 4: expected"):
            read_manifest(path)

    def test_five_rows_are_named(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.csv", {"path": ["a"] * 7, "label": [""] * 7, "domain": ["b"] * 7})
        with pytest.raises(DataError, match=r"is empty in rows 2, 3, 4, 5, 6 and 2 more: expected"):
            read_manifest(path)

    @ENDINGS
    @pytest.mark.parametrize(
        ("labels", "domains", "difference"),
        [
            (["cat", "dog", "cat", "dog"], ["photo", "photo", "photo", "sketch"], ""),
            (
                ["cat", "dog", "dog", "dog"],
                ["photo", "photo", "photo", "sketch"],
                " with different labels 'cat', 'dog'",
            ),
            (
                ["cat", "dog", "dog", "dog"],
                ["photo", "photo", "sketch", "sketch"],
                " with different labels 'cat', 'dog' and domains 'photo', 'sketch'",
            ),
        ],
    )
    def test_a_path_that_stands_there_twice_is_refused(
        self, tmp_path: Path, ending: str, labels: list[str], domains: list[str], difference: str
    ) -> None:
        columns = rows(path=["b.png", "a.png", "b.png", "d.png"], label=labels, domain=domains)
        path = write(tmp_path / f"x{ending}", columns)
        where = f"rows {row(1, ending)} and {row(3, ending)} of {path}"
        message = f"path 'b.png' stands in {where}{difference}: expected one row for each image"
        with pytest.raises(DataError, match=re.escape(message)):
            read_manifest(path)

    def test_all_rows_of_a_path_are_named(self, tmp_path: Path) -> None:
        paths = ["b", "a", "b", "b", "a", "c"]
        path = write(tmp_path / "x.csv", {"path": paths, "label": ["l"] * 6, "domain": ["d"] * 6})
        with pytest.raises(
            DataError, match=r"path 'a' stands in rows 3 and 6 .* \(and 1 more paths stand there several"
        ):
            read_manifest(path)
        path = write(tmp_path / "x.csv", {"path": [*paths[2:4], "b"], "label": ["l"] * 3, "domain": ["d"] * 3})
        with pytest.raises(DataError, match=r"path 'b' stands in rows 2, 3 and 4 of .*csv: expected"):
            read_manifest(path)

    def test_repeats_are_found_across_batches(self) -> None:
        paths = pa.array(["a", "b", "b", "b", "c", "d", "d"])
        for batch in range(1, 8):
            assert listing_module._repeats(paths, np.arange(7), batch).tolist() == [2, 3, 6]

    def test_absolute_paths_below_the_manifest_are_the_relative_ones(self, tmp_path: Path) -> None:
        root = tmp_path / "données"
        root.mkdir()
        paths = [str(root / "é" / "a.png"), "é/b.png", f"{root}x/c.png", "/d.png"]
        listing = read_manifest(write(root / "x.csv", rows(path=paths, domain=["photo"] * 4)))
        assert listing.domains["photo"].paths.to_pylist() == ["/d.png", f"{root}x/c.png", "é/a.png", "é/b.png"]
        paths[1] = "é/a.png"
        with pytest.raises(DataError, match=r"path 'é/a.png' stands in rows 2 and 3"):
            read_manifest(write(root / "x.csv", rows(path=paths)))

    @pytest.mark.parametrize(
        "spelling",
        [
            "./imgs/a.png",
            "imgs/./a.png",
            "imgs//a.png",
            "imgs/dog/../a.png",
            "../data/imgs/a.png",
            "{root}/./imgs/a.png",
            "{root}/../data/imgs/a.png",
            "/{root}//imgs/a.png",
        ],
    )
    def test_spellings_of_a_path_are_one(self, tmp_path: Path, spelling: str) -> None:
        root = tmp_path / "data"
        root.mkdir()
        spelling = spelling.format(root=root)
        plain = read_manifest(write(root / "x.csv", rows(path=["imgs/a.png", "b.png", "c.png", "d.png"])))
        other = read_manifest(write(root / "x.csv", rows(path=[spelling, "b.png", "c.png", "d.png"])))
        assert contents(other) == contents(plain)
        sizes = {name: np.array([1, 2]) for name in ("photo", "sketch")}
        assert fingerprint(other, sizes) == fingerprint(plain, sizes)
        with pytest.raises(DataError, match=r"path 'imgs/a.png' stands in rows 2 and 4"):
            read_manifest(write(root / "x.csv", rows(path=["imgs/a.png", "b.png", spelling, "d.png"])))

    def test_paths_out_of_the_folder_stay(self, tmp_path: Path) -> None:
        root = tmp_path / "data"
        root.mkdir()
        paths = ["../a.png", "../database/b.png", "../../c..png", "d./e.png"]
        listing = read_manifest(write(root / "x.csv", rows(path=paths)))
        assert [path for domain in contents(listing).values() for path, _ in domain] == sorted(paths[:2]) + sorted(
            paths[2:]
        )

    @pytest.mark.parametrize("mark", [";", "\t"])
    def test_other_marks_than_commas(self, tmp_path: Path, mark: str) -> None:
        path = tmp_path / "x.csv"
        path.write_text(mark.join(["path", "label", "domain"]) + "\n" + mark.join("abc") + "\n")
        with pytest.raises(DataError, match=r"lacks the columns .* split, group, with commas between the columns$"):
            read_manifest(path)
        path.write_text("path,label\na,b\n")
        with pytest.raises(DataError, match=r"lacks the column 'domain': .* split, group$"):
            read_manifest(path)

    def test_classes_are_checked_as_in_folders(self, tmp_path: Path, warnings_logged: Warnings) -> None:
        path = write(tmp_path / "pets.csv", rows(label=["cat", "dog", "cat", "cat"]))
        assert read_manifest(path).classes == ("cat", "dog")
        assert warnings_logged() == ["'pets' has no image of class 'dog' in domain 'sketch'"]
        with pytest.raises(DataError, match=r"^'pets' has no image of class 'dog' in domain 'sketch': expected every"):
            read_manifest(path, strict=True)

    def test_one_class_is_enough(self, tmp_path: Path, warnings_logged: Warnings) -> None:
        path = write(tmp_path / "x.csv", rows(label=["cat"] * 4))
        assert read_manifest(path).classes == ("cat",)
        assert list_folder(tree(tmp_path / "pets", "a/cat/1.jpg", "b/cat/1.jpg")).classes == ("cat",)
        assert warnings_logged() == []

    def test_one_domain_is_enough(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.csv", rows(domain=["new"] * 4))
        assert list(read_manifest(path).domains) == ["new"]


class TestSplit:
    @ENDINGS
    def test_words_for_both_splits(self, tmp_path: Path, ending: str) -> None:
        words = ["train", "in", "val", "valid", "validation", "out"]
        columns = {
            "path": [f"{index}.png" for index in range(6)][::-1],
            "label": ["cat", "dog"] * 3,
            "domain": ["photo"] * 6,
            "split": words[::-1],
        }
        part = read_manifest(write(tmp_path / f"x{ending}", columns)).domains["photo"]
        assert part.paths.to_pylist() == [f"{index}.png" for index in range(6)]
        assert part.out.tolist() == [False, False, True, True, True, True]
        assert part.out.dtype == np.bool_

    def test_a_domain_may_lack_either_split(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.csv", rows(split=["in", "in", "in", "out"]))
        assert not read_manifest(path).domains["photo"].out.any()
        write(path, rows(split=["in", "in", "out", "out"]))
        assert read_manifest(path).domains["sketch"].out.all()

    @ENDINGS
    def test_test_rows_are_told_where_to_go(self, tmp_path: Path, ending: str) -> None:
        path = write(tmp_path / f"x{ending}", rows(split=["in", "test", "in", "test"]))
        where = rf"split 'test' in rows {row(2, ending)} and {row(4, ending)} of {re.escape(str(path))}: a domain has"
        with pytest.raises(DataError, match=rf"{where}.*give test images a domain of their own and .* --test-domain"):
            read_manifest(path)

    def test_other_words_are_refused(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.csv", rows(split=["in", "in", "Train", "test"]))
        with pytest.raises(
            DataError, match=r"split 'Train' in row 4 of .*: expected train, in, val, valid, validation, out$"
        ):
            read_manifest(path)


class TestGroups:
    @ENDINGS
    def test_codes_are_the_same_in_every_domain(self, tmp_path: Path, ending: str) -> None:
        columns = rows(group=["p9", "", "p9", "p1"]) | {"path": ["b.png", "a.png", "c.png", "d.png"]}
        domains = read_manifest(write(tmp_path / f"x{ending}", columns)).domains
        assert domains["photo"].groups.tolist() == [0, 1]
        assert domains["sketch"].groups.tolist() == [1, 2]
        assert domains["photo"].groups.dtype == np.int64

    def test_empty_groups_are_none_of_the_named(self, tmp_path: Path) -> None:
        domains = read_manifest(write(tmp_path / "x.csv", rows(group=["x", "x", "", "y"]))).domains
        assert [*domains["photo"].groups, *domains["sketch"].groups] == [0, 0, 1, 2]

    @pytest.mark.parametrize(
        "groups",
        [
            ["x", None, "", " "],
            pa.nulls(4),
            pa.array([5, None, None, None]),
            ["x", None, "y", None],
            pa.DictionaryArray.from_arrays(pa.array([0, 1, 1, None], pa.int8()), ["x", ""]),
        ],
        ids=["text", "nulls", "numbers", "two names", "dictionary"],
    )
    def test_empty_groups_are_groups_of_their_own(self, tmp_path: Path, groups: Any) -> None:
        domains = read_manifest(write(tmp_path / "x.parquet", rows(group=groups))).domains
        assert [*domains["photo"].groups, *domains["sketch"].groups] == [0, 1, 2, 3]


class TestLargeManifest:
    ROWS = 200_000

    @pytest.fixture(params=[".csv", ".parquet"])
    def large(self, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
        order = np.random.default_rng(0).permutation(self.ROWS)
        table = pa.table(
            {
                "path": [f"images/hospital_{i % 5}/patient{i // 4:07d}/{i:08d}.jpg" for i in order],
                "label": [f"class_{i // 5 % 10}" for i in order],
                "domain": [f"hospital_{i % 5}" for i in order],
                "split": ["val" if i % 7 == 0 else "train" for i in order],
                "group": [f"patient{i // 4:07d}" for i in order],
            }
        )
        path = tmp_path / f"large{request.param}"
        (pa.csv.write_csv if request.param == ".csv" else pa.parquet.write_table)(table, path)
        return path

    def test_takes_seconds_and_little_memory(self, large: Path) -> None:
        arrow_before = pa.total_allocated_bytes()
        tracemalloc.start()
        start = time.perf_counter()
        listing = read_manifest(large)
        seconds = time.perf_counter() - start
        python_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        arrow = pa.total_allocated_bytes() - arrow_before
        assert seconds < 12  # a million in a minute
        # The paths' texts and offsets take 50 bytes each, arrays of numpy some 50 more; a Python string alone takes 90.
        assert arrow < 60 * self.ROWS
        assert python_peak < 80 * self.ROWS

        part = listing.domains["hospital_3"]
        assert part.paths[0].as_py() == "images/hospital_3/patient0000000/00000003.jpg"
        numbers = 5 * np.arange(self.ROWS // 5) + 3
        assert np.array_equal(part.labels, numbers // 5 % 10)
        assert np.array_equal(part.out, numbers % 7 == 0)
        groups = np.concatenate([part.groups for part in listing.domains.values()])
        patients = np.concatenate([(5 * np.arange(self.ROWS // 5) + rest) // 4 for rest in range(5)])
        pairs = np.unique(np.stack([groups, patients]), axis=1)
        assert pairs.shape[1] == len(np.unique(patients)) == groups.max() + 1


class TestBenchmarks:
    @pytest.fixture
    def tiny(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
        """A data root with a benchmark "tiny" of the smallest size."""
        layout = BenchmarkLayout("TINY", ("A", "B"), (4, 5), 2, "ask its makers", images_per_domain=(2, 2))
        monkeypatch.setitem(BENCHMARKS, "tiny", layout)  # type: ignore[arg-type]
        tree(tmp_path / "TINY", *(f"{domain}/{name}/1.jpg" for domain in "AB" for name in ("cat", "dog")))
        return tmp_path

    def test_real_pacs(self, data_root: Path, warnings_logged: Warnings) -> None:
        if not (data_root / "PACS").is_dir():
            pytest.skip(f"no PACS in {data_root}")
        listing = list_benchmark("pacs", data_root)
        assert listing.name == "pacs"
        assert listing.classes == ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
        counts = {name: np.bincount(part.labels).tolist() for name, part in listing.domains.items()}
        assert counts == {
            "art_painting": [379, 255, 285, 184, 201, 295, 449],
            "cartoon": [389, 457, 346, 135, 324, 288, 405],
            "photo": [189, 202, 182, 186, 199, 280, 432],
            "sketch": [772, 740, 753, 608, 816, 80, 160],
        }
        assert sum(map(sum, counts.values())) == 9_991
        assert not warnings_logged()
        sizes = file_sizes(listing)
        assert all(part.min() > 0 for part in sizes.values())
        assert fingerprint(listing, sizes) == fingerprint(list_folder(data_root / "PACS"), sizes)

    @pytest.mark.parametrize("name", list(BENCHMARKS))
    def test_published_order_is_the_sorted_one(self, name: str) -> None:
        assert list(BENCHMARKS[name].domains) == sorted(BENCHMARKS[name].domains)

    def test_the_published_layout_is_taken(self, tiny: Path) -> None:
        listing = list_benchmark("tiny", tiny)
        assert listing.name == "tiny"
        assert listing.root == tiny / "TINY"
        assert contents(listing)["B"] == [("B/cat/1.jpg", "cat"), ("B/dog/1.jpg", "dog")]

    @pytest.mark.parametrize(
        ("files", "differences"),
        [
            (["A/cat/2.jpg"], "images of A: expected 2, found 3"),
            (
                ["A/cat/2.jpg", "B/cat/2.jpg"],
                "images: expected 4 or 5, found 6; images of A: expected 2, found 3; images",
            ),
            (["A/emu/2.jpg"], "classes: expected 2, found 3; images of A: expected 2, found 3"),
            (["C/cat/1.jpg"], "domains: expected A, B, found A, B, C"),
        ],
    )
    def test_other_content_is_refused(self, tiny: Path, files: list[str], differences: str) -> None:
        folder = tree(tiny / "TINY", *files)
        with pytest.raises(DataError) as caught:
            list_benchmark("tiny", tiny)
        assert f"{folder} is not tiny as published ({differences}" in str(caught.value)
        assert str(caught.value).endswith(
            f"): complete it (ask its makers), or, if it is meant to be as it is, name the folder itself: "
            f"fishr train --data {folder}"
        )

    @pytest.mark.parametrize("name", list(BENCHMARKS))
    def test_wrong_counts_are_refused(self, tmp_path: Path, name: str) -> None:
        layout = BENCHMARKS[name]
        tree(tmp_path / layout.folder, *(f"{domain}/{name}/1.jpg" for domain in layout.domains for name in "ab"))
        images = " or ".join(f"{total:,}" for total in layout.images)
        message = (
            f"as published (classes: expected {layout.classes}, found 2; images: expected {images}, "
            f"found {2 * len(layout.domains)}"
        )
        with pytest.raises(DataError, match=re.escape(message)):
            list_benchmark(name, tmp_path)

    @pytest.mark.parametrize("name", list(BENCHMARKS))
    def test_missing_benchmarks_are_told_where_from(self, tmp_path: Path, name: str) -> None:
        layout = BENCHMARKS[name]
        message = (
            f"no {name} in {tmp_path}: expected the folder {tmp_path / layout.folder} with DOMAIN/CLASS/image in it, "
            f"the domains being {', '.join(layout.domains)}; {layout.source}"
        )
        with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
            list_benchmark(name, tmp_path)

    def test_unknown_names_get_a_suggestion(self, tmp_path: Path) -> None:
        with pytest.raises(
            ConfigError, match=r"unknown benchmark 'pac'; did you mean 'pacs'\? \(known: domain-net, off"
        ):
            list_benchmark("pac", tmp_path)


class TestFileSizes:
    def test_bytes_in_order(self, tmp_path: Path) -> None:
        root = two_domains(tmp_path)
        (root / "photo" / "dog" / "1.jpg").write_bytes(b"12345")
        (root / "sketch" / "cat" / "1.jpg").write_bytes(b"12")
        sizes = file_sizes(list_folder(root))
        assert {name: part.tolist() for name, part in sizes.items()} == {"photo": [0, 5], "sketch": [2, 0]}
        assert sizes["photo"].dtype == np.int64

    def test_absolute_paths(self, tmp_path: Path) -> None:
        far = tree(tmp_path / "far", "a.png", "b.png", "c.png", "d.png")
        (far / "d.png").write_bytes(b"123")
        (tmp_path / "near").mkdir()
        paths = [str(far / name) for name in ("a.png", "b.png", "c.png", "d.png")]
        listing = read_manifest(write(tmp_path / "near" / "x.csv", rows(path=paths)))
        assert file_sizes(listing)["sketch"].tolist() == [0, 3]

    def test_missing_files_are_counted_and_three_named(self, tmp_path: Path) -> None:
        paths = ["a.png", "folder.png", "a.png/below.png", "nul\0.png", "z.png", "x" * 300]
        tree(tmp_path, "a.png", "folder.png/b.png")
        columns = {"path": paths, "label": ["cat", "dog"] * 3, "domain": ["photo"] * 3 + ["sketch"] * 3}
        listing = read_manifest(write(tmp_path / "pets.parquet", columns))
        message = (
            "5 of 6 images of 'pets' are missing or no files ('a.png/below.png', 'folder.png', 'nul\\x00.png' and 2 "
            f"more), looked for from {tmp_path}: correct the paths, or put the images there"
        )
        with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
            file_sizes(listing)

    def test_more_images_than_are_read_at_once(self, tmp_path: Path) -> None:
        count = 5_000
        columns = {"path": [f"{i:04d}" for i in range(count)], "label": ["cat", "dog"] * 2_500, "domain": ["d"] * count}
        listing = read_manifest(write(tmp_path / "x.csv", columns))
        assert list(listing_module._iterate(listing.domains["d"].paths)) == columns["path"]
        with pytest.raises(DataError, match=r"5,000 of 5,000 images of 'x' are missing .*'0002' and 4,997 more"):
            file_sizes(listing)


class TestFingerprint:
    COLUMNS = rows(split=["in", "out", "in", "out"], group=["x", "y", "x", "z"])
    SIZES = {"photo": np.array([1, 2]), "sketch": np.array([3, 4])}  # noqa: RUF012

    def of(self, folder: Path, sizes: Mapping[str, Any] = SIZES, **changes: Sequence[Any]) -> str:
        return fingerprint(read_manifest(write(folder / "x.csv", self.COLUMNS | changes)), sizes)

    def test_is_known(self, tmp_path: Path) -> None:
        """Caches and runs are named by it: a change of its making is a change of format."""
        assert self.of(tmp_path) == "9bbc918cedbcd396"

    @pytest.mark.parametrize(
        "changes",
        [
            {"path": ["a.png", "bb.png", "c.png", "d.png"]},
            {"path": ["a.pn", "gb.png", "c.png", "d.png"]},
            {"label": ["dog", "cat", "cat", "dog"]},
            {"label": ["cat", "emu", "cat", "emu"]},
            {
                "domain": ["photo", "photo", "tattoo", "tattoo"],
                "sizes": {"photo": SIZES["photo"], "tattoo": SIZES["sketch"]},
            },
            {"split": ["in", "in", "in", "out"]},
            {"group": ["x", "x", "x", "z"]},
            {"group": ["x", "y", "z", "x"]},
            {"sizes": {"photo": np.array([1, 2]), "sketch": np.array([3, 5])}},
            {"sizes": {"photo": np.array([2, 1]), "sketch": np.array([3, 4])}},
        ],
        ids=str,
    )
    def test_notices(self, tmp_path: Path, changes: dict[str, Any]) -> None:
        assert self.of(tmp_path, **changes) != self.of(tmp_path)

    def test_notices_columns_that_are_not_there(self, tmp_path: Path) -> None:
        constant = {"split": ["in"] * 4, "group": ["x", "y", "z", "w"]}
        kinds = [{}, {"split": constant["split"]}, {"group": constant["group"]}, constant]
        found = {fingerprint(read_manifest(write(tmp_path / "x.csv", rows(**kind))), self.SIZES) for kind in kinds}
        assert len(found) == len(kinds)

    def test_does_not_notice_names_of_groups(self, tmp_path: Path) -> None:
        assert self.of(tmp_path, group=["c", "b", "c", "a"]) == self.of(tmp_path)

    def test_names_the_data_wherever_they_lie(self, tmp_path: Path) -> None:
        root = two_domains(tmp_path / "here")
        (root / "photo" / "cat" / "1.jpg").write_bytes(b"123")
        shutil.copytree(root, tmp_path / "there")
        listing = list_folder(root)
        images = [(path, name, domain) for domain, part in contents(listing).items() for path, name in part]
        columns = dict(zip(("path", "label", "domain"), zip(*images, strict=True), strict=True))
        manifest = read_manifest(write(root / "manifest.csv", columns))
        found = {
            fingerprint(listing, file_sizes(listing))
            for listing in (listing, list_folder(tmp_path / "there"), manifest, replace(listing, name="other"))
        }
        assert len(found) == 1
        assert re.fullmatch("[0-9a-f]{16}", found.pop())

    def test_does_not_see_how_arrow_holds_the_paths(self, tmp_path: Path) -> None:
        listing = list_folder(two_domains(tmp_path))
        sizes = file_sizes(listing)
        sliced = {
            name: replace(part, paths=pa.array(["before", *part.paths.to_pylist(), "after"]).slice(1, len(part.paths)))
            for name, part in listing.domains.items()
        }
        assert fingerprint(replace(listing, domains=sliced), sizes) == fingerprint(listing, sizes)
