"""Which images there are, of which domain and class: from folders, a manifest or a benchmark's published layout.

Listing opens no image. Domains and classes are sorted by name, the images of a domain by path, always by code point and
never by locale: the same data make the same listing, whatever the order of a manifest's rows or of a disk's folders.
"""

import csv
import difflib
import hashlib
import json
import logging
import os
import posixpath
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from fishr.errors import DataError
from fishr.registry import unknown

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"},
)
"""Endings that make a file an image, compared in lower case."""

JUNK = frozenset({"__macosx", "thumbs.db", "desktop.ini"})
"""What operating systems leave between images, in lower case; passed over in silence, as is what begins with a dot."""

MANIFEST_SUFFIXES = (".csv", ".parquet")
REQUIRED_COLUMNS, OPTIONAL_COLUMNS = ("path", "label", "domain"), ("split", "group")

OUT_SPLIT = {"train": False, "in": False, "val": True, "valid": True, "validation": True, "out": True}
"""Values of a manifest's split column, and whether they mean the out-split."""

LAYOUT = "DOMAIN/CLASS/image"
_DICTIONARY = pa.dictionary(pa.int32(), pa.string())
FINGERPRINT_DIGITS = 16


@dataclass(frozen=True)
class DomainListing:
    """The images of one domain, sorted by path.

    Attributes:
        paths: Path of each image with slashes, relative to the listing's root, or absolute.
        labels: Index of each image's class, int64 ``[sample]``.
        out: Whether the manifest puts an image in the out-split, ``[sample]``; None where nothing says so.
        groups: Code of each image's group, int64 ``[sample]``, the same in every domain; None without groups.
    """

    paths: pa.StringArray
    labels: NDArray[np.int64]
    out: NDArray[np.bool_] | None = None
    groups: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class ImageListing:
    """All images of a dataset.

    Attributes:
        name: The benchmark's name, the folder's, or the manifest's without its ending.
        root: The folder, absolute, that relative paths start from.
        classes: Names of the classes, sorted; labels are indices into them.
        domains: Name of each domain to its images, sorted by name.
    """

    name: str
    root: Path
    classes: tuple[str, ...]
    domains: Mapping[str, DomainListing]


@dataclass(frozen=True)
class BenchmarkLayout:
    """A benchmark as published, laid out as ``FOLDER/DOMAIN/CLASS/image``.

    Attributes:
        folder: Its folder in the data root.
        domains: Folders of its domains, in the customary order.
        images: Totals that it is known with.
        classes: Number of classes.
        source: How to get the data.
        images_per_domain: Images of each domain, where that is known.
    """

    folder: str
    domains: tuple[str, ...]
    images: tuple[int, ...]
    classes: int
    source: str
    images_per_domain: tuple[int, ...] | None = None


BENCHMARKS: Mapping[str, BenchmarkLayout] = {
    "vlcs": BenchmarkLayout(
        folder="VLCS",
        domains=("Caltech101", "LabelMe", "SUN09", "VOC2007"),
        images=(10_729,),
        classes=5,
        source="only drive links lead to it, and they come and go: ask at "
        "github.com/facebookresearch/DomainBed/issues, then: fishr data prepare vlcs ARCHIVE",
    ),
    "pacs": BenchmarkLayout(
        folder="PACS",
        domains=("art_painting", "cartoon", "photo", "sketch"),
        images=(9_991,),
        classes=7,
        source="get it with: fishr data download pacs",
        images_per_domain=(2_048, 2_344, 1_670, 3_929),
    ),
    "office-home": BenchmarkLayout(
        folder="office_home",
        domains=("Art", "Clipart", "Product", "Real World"),
        images=(15_588,),
        classes=65,
        source="only drive links lead to it, and they come and go: ask at "
        "github.com/facebookresearch/DomainBed/issues, then: fishr data prepare office-home ARCHIVE",
        images_per_domain=(2_427, 4_365, 4_439, 4_357),
    ),
    "terra-incognita": BenchmarkLayout(
        folder="terra_incognita",
        domains=("location_100", "location_38", "location_43", "location_46"),
        images=(24_788, 24_330),
        classes=10,
        source="get it with: fishr data download terra-incognita",
    ),
    "domain-net": BenchmarkLayout(
        folder="domain_net",
        domains=("clipart", "infograph", "painting", "quickdraw", "real", "sketch"),
        images=(586_575,),
        classes=345,
        source="get it with: fishr data download domain-net",
    ),
}
"""The five image benchmarks of DomainBed (Gulrajani and Lopez-Paz, arXiv 2007.01434), in DomainBed's folders."""


def existing_path(text: str) -> Path | None:
    """The file or folder at a path, which may begin with ``~``; None if there is none."""
    path = Path(text)
    with suppress(RuntimeError):  # no such user
        path = path.expanduser()
    return path if text and path.exists() else None  # an empty path would be the current folder


def list_images(source: Path, *, strict: bool = False) -> ImageListing:
    """List the images of a folder (:func:`list_folder`) or of a manifest (:func:`read_manifest`).

    Raises:
        DataError: something else, or as those.
    """
    if source.is_dir():
        return list_folder(source, strict=strict)
    if source.suffix.lower() in MANIFEST_SUFFIXES:
        return read_manifest(source, strict=strict)
    raise DataError(f"{source} is neither a folder nor a manifest ({' or '.join(MANIFEST_SUFFIXES)})")


def list_folder(path: Path, *, strict: bool = False) -> ImageListing:
    """List the images of a folder laid out as DOMAIN/CLASS/image.

    Images in deeper folders belong to the class as well. Links are followed; a folder that leads back to one it lies in
    is passed over. Hidden names and :data:`JUNK` are passed over in silence, other files that are no images by their
    ending, and images outside of class folders, with a warning.

    Args:
        path: The folder.
        strict: Refuse classes that are missing from a domain, instead of warning.

    Raises:
        DataError: no such folder, another layout, a domain without images, a name that is no UTF-8; with
            ``strict`` a class without images in some domain.
    """
    root = path.expanduser().absolute()
    top = _scan(root, root, frozenset())
    strays, others = list(top.images), list(top.others)
    found: dict[str, list[tuple[str, str]]] = {}
    named = set()
    for domain in _scan_folders(root, top):
        strays += domain.images
        others += domain.others
        found[domain.path] = samples = []
        for class_folder in _scan_folders(root, domain):
            name = class_folder.path.removeprefix(f"{domain.path}/")
            named.add(name)
            for folder in _walk(root, class_folder):
                samples += [(image, name) for image in folder.images]
                others += folder.others
    _check_layout(root, found, strays)
    if strays:
        logger.warning("%s: left out %s", root, _count(strays, "image", "outside of class folders"))
    if others:
        logger.warning("%s: left out %s", root, _count(others, "file", "without the ending of an image"))

    classes = tuple(sorted({name for samples in found.values() for _, name in samples}))
    index = {name: label for label, name in enumerate(classes)}
    domains = {}
    for name in sorted(found):
        samples = sorted(found[name])
        labels = np.array([index[class_name] for _, class_name in samples], np.int64)
        domains[name] = DomainListing(pa.array([image for image, _ in samples], pa.string()), labels)
    listing = ImageListing(root.name, root, classes, domains)
    _check_classes(listing, named, strict)
    return listing


def read_manifest(path: Path, *, strict: bool = False) -> ImageListing:
    """List the images that a table names: one row for each, with columns path, label, domain [, split] [, group].

    Paths are absolute or relative to the manifest's folder; ``./a//b/../c.png`` is the same as ``a/c.png``. Files need
    not exist (see :func:`file_sizes`). Labels and domains are text: 007 stays 007, whole numbers in Parquet become
    text. A split column decides the out-split (:data:`OUT_SPLIT`). Images of the same group belong together; an empty
    group is a group of its own. Other columns are ignored, with a warning where one is spelled nearly like split or
    group. Rows in messages are numbered from 1; a CSV file's header is row 1.

    Args:
        path: A .csv file (UTF-8, with or without byte order mark) or a .parquet file.
        strict: Refuse classes that are missing from a domain, instead of warning.

    Raises:
        DataError: a file that cannot be read, missing columns, empty cells, a path that stands there twice, unknown
            values of split; with ``strict`` a class without images in some domain.
    """
    path = path.expanduser().absolute()
    root = path.parent
    manifest = _read_table(path)
    paths = _relative_paths(manifest.columns["path"], root)
    manifest.check_filled("path", _is_blank(paths))
    labels, classes = manifest.text_codes("label")
    domains, names = manifest.text_codes("domain")
    out = _out_split(manifest) if "split" in manifest.columns else None

    rows = pc.sort_indices(paths).to_numpy().view(np.int64)
    _check_unique(manifest, paths, rows, {"label": (labels, classes), "domain": (domains, names)})
    rows = rows[np.argsort(domains[rows], kind="stable")]
    groups = _group_codes(manifest, rows) if "group" in manifest.columns else None

    manifest.columns.clear()  # of no more use, and the paths are about to be copied
    pa.default_memory_pool().release_unused()
    listings = {}
    ends = np.cumsum(np.bincount(domains, minlength=len(names)))
    for name, start, end in zip(names, (0, *ends[:-1]), ends, strict=True):
        part = rows[start:end]
        listings[name] = DomainListing(
            paths.take(pa.array(part)),
            labels[part].astype(np.int64),
            None if out is None else out[part],
            None if groups is None else groups[start:end],
        )
    listing = ImageListing(path.stem, root, tuple(classes), listings)
    _check_classes(listing, (), strict)
    return listing


def list_benchmark(name: str, root: Path) -> ImageListing:
    """List one of :data:`BENCHMARKS` and check that it is the published one.

    Args:
        name: Name of the benchmark.
        root: The data root, which holds the benchmark's folder.

    Raises:
        ConfigError: no such benchmark.
        DataError: the folder is missing or cannot be used, or its domains, number of classes or numbers of images are
            not the published ones.
    """
    if name not in BENCHMARKS:
        raise unknown("benchmark", name, BENCHMARKS)
    layout = BENCHMARKS[name]
    folder = root.expanduser().absolute() / layout.folder
    if not folder.is_dir():
        raise DataError(
            f"no {name} in {root}: expected the folder {folder} with {LAYOUT} in it, the domains being "
            f"{', '.join(layout.domains)}; {layout.source}"
        )
    listing = replace(list_folder(folder), name=name)
    differences = published_differences(name, listing)
    if differences:
        raise DataError(
            f"{folder} is not {name} as published ({'; '.join(differences)}): complete it ({layout.source}), or, if it "
            f"is meant to be as it is, name the folder itself: fishr train --data {folder}"
        )
    return listing


def published_differences(name: str, listing: ImageListing) -> list[str]:
    """How a listing of one of :data:`BENCHMARKS` is not as published: domains, number of classes, numbers of images.

    Returns:
        Nothing, or a phrase for each difference.
    """
    layout = BENCHMARKS[name]
    sizes = {domain: len(part.labels) for domain, part in listing.domains.items()}
    comparisons = [
        ("domains", [", ".join(layout.domains)], ", ".join(sizes)),
        ("classes", [str(layout.classes)], str(len(listing.classes))),
        ("images", [f"{total:,}" for total in layout.images], f"{sum(sizes.values()):,}"),
    ]
    for domain, images in zip(layout.domains, layout.images_per_domain or (), strict=False):
        comparisons.append((f"images of {domain}", [f"{images:,}"], f"{sizes.get(domain, 0):,}"))
    return [
        f"{what}: expected {' or '.join(expected)}, found {found}"
        for what, expected, found in comparisons
        if found not in expected
    ]


def file_sizes(listing: ImageListing) -> dict[str, NDArray[np.int64]]:
    """Bytes of every image, by one ``stat`` each.

    Returns:
        Name of each domain to sizes in bytes, int64 ``[sample]``.

    Raises:
        DataError: images that are missing, cannot be reached or are no files.
    """
    missing: list[str] = []
    sizes = {}
    for name, domain in listing.domains.items():
        sizes[name] = np.fromiter(
            (_file_size(listing.root, path, missing) for path in _iterate(domain.paths)), np.int64, len(domain.paths)
        )
    if missing:
        raise DataError(
            f"{len(missing):,} of {sum(map(len, sizes.values())):,} images of {listing.name!r} are missing or no files "
            f"({_few([repr(path) for path in missing], 3)}), looked for from {listing.root}: correct the paths, or put "
            "the images there"
        )
    return sizes


def fingerprint(listing: ImageListing, sizes: Mapping[str, NDArray[np.int64]]) -> str:
    """A name for the data, wherever they lie: it changes when the listing or the size of a file does.

    SHA-256 over the names of classes and domains, and of every image path, label, size in bytes, out-split and group.
    Root and name of the listing are not in it, so a folder, its copy and a manifest of the same images that knows no
    more than the folder agree. The content of files is not read: an image that is edited or replaced without a change
    of its size goes unnoticed.

    Args:
        listing: The images.
        sizes: Their sizes, from :func:`file_sizes`.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps([listing.classes, list(listing.domains)]).encode())
    for name, domain in listing.domains.items():
        columns = (domain.labels, sizes[name], domain.out, domain.groups)
        # Lengths and presence go in first, so that no two listings give the same bytes.
        digest.update(json.dumps([len(domain.paths), *(column is not None for column in columns)]).encode())
        offsets, text = _text_buffers(domain.paths)
        digest.update(text.data)
        for column in (np.diff(offsets), *columns):
            if column is not None:
                digest.update(column.astype("<i8").tobytes())
    return digest.hexdigest()[:FINGERPRINT_DIGITS]


class _Folder(NamedTuple):
    """What lies in a folder, all as paths from the root; ``chain`` identifies the folders it lies in and itself."""

    path: str
    chain: frozenset[tuple[int, int]]
    folders: list[str]
    images: list[str]
    others: list[str]


def _scan(root: Path, folder: Path, chain: frozenset[tuple[int, int]]) -> _Folder:
    path = "" if folder == root else folder.relative_to(root).as_posix()
    folders: list[str] = []
    images: list[str] = []
    others: list[str] = []
    suffixes = tuple(IMAGE_SUFFIXES)
    try:
        identity = folder.stat()
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name.lower() in JUNK:
                    continue
                _check_name(entry)
                below = f"{path}/{entry.name}".removeprefix("/")
                if _is_folder(entry):
                    folders.append(below)
                elif entry.name.lower().endswith(suffixes):
                    images.append(below)
                else:
                    others.append(below)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be listed ({error.strerror}): expected a folder with {LAYOUT} in it"
        ) from error
    return _Folder(path, chain | {(identity.st_dev, identity.st_ino)}, folders, images, others)


def _scan_folders(root: Path, folder: _Folder) -> Iterator[_Folder]:
    """The folders in a folder, without those that lead back to one it lies in."""
    for name in folder.folders:
        scanned = _scan(root, root / name, folder.chain)
        if len(scanned.chain) > len(folder.chain):
            yield scanned


def _walk(root: Path, folder: _Folder) -> Iterator[_Folder]:
    yield folder
    for below in _scan_folders(root, folder):
        yield from _walk(root, below)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _check_name(entry: os.DirEntry[str]) -> None:
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        folder = os.fsencode(entry.path)[: -len(os.fsencode(entry.name)) - 1]
        raise DataError(
            f"the name {os.fsencode(entry.name)!r} in {os.fsdecode(folder)} is no UTF-8: rename it"
        ) from None


def _check_layout(root: Path, found: Mapping[str, Sequence[object]], strays: Sequence[str]) -> None:
    """Raises DataError for folders without images, with what the layout looks like instead."""
    if not found:
        holds = "holds images but no folders" if strays else "holds no folders with images"
        raise DataError(f"{root} {holds}: expected {LAYOUT}")
    if strays and not any(found.values()):
        raise DataError(
            f"{root} looks like CLASS/image (such as {min(strays)!r}): expected {LAYOUT}; put the class folders of "
            "each domain into a folder of its own"
        )
    empty = sorted(name for name, samples in found.items() if not samples)
    if empty:
        raise DataError(
            f"no images in class folders of {_few([repr(name) for name in empty], 5)} in {root}: expected {LAYOUT}; "
            f"fill the {'folder' if len(empty) == 1 else 'folders'}, or move what is no domain elsewhere"
        )


def _check_classes(listing: ImageListing, named: Iterable[str], strict: bool) -> None:
    """Tells which domains lack which classes.

    Classes may be as few as one: such data cannot be trained on, but a model can be evaluated with them.

    Args:
        listing: The listing.
        named: Further names of classes, of which there may be no image at all.
        strict: Raise DataError, instead of logging a warning.
    """
    everywhere = sorted({*named, *listing.classes})
    missing = []
    for domain, part in listing.domains.items():
        present = {listing.classes[label] for label in np.unique(part.labels)}
        missing += [f"{name!r} in domain {domain!r}" for name in everywhere if name not in present]
    if missing:
        message = f"{listing.name!r} has no image of class {_few(missing, 5)}"
        if strict:
            raise DataError(f"{message}: expected every class in every domain; add images or leave the classes out")
        logger.warning(message)


class _Manifest(NamedTuple):
    """A manifest's columns: path as text, all others dictionary-encoded."""

    path: Path
    columns: dict[str, pa.Array]
    first_row: int

    def rows(self, indices: Collection[int]) -> str:
        """Row numbers for a message."""
        numbers = sorted(index + self.first_row for index in indices)
        return f"{'row' if len(numbers) == 1 else 'rows'} {_few([str(number) for number in numbers], 5, ' and ')}"

    def check_filled(self, column: str, empty: NDArray[np.bool_]) -> None:
        """Raises DataError with the rows in which a column is empty."""
        if empty.any():
            raise DataError(
                f"column {column!r} of {self.path} is empty in {self.rows(np.flatnonzero(empty).tolist())}: expected a "
                "text in every row; fill it in, or leave the row out"
            )

    def text_codes(self, column: str) -> tuple[NDArray[np.int32], list[str]]:
        """The texts of a column, sorted, and each row's index into them."""
        codes, empty = _dictionary_codes(self.columns[column])
        self.check_filled(column, empty)
        texts = self.columns[column].dictionary
        used = np.unique(codes)
        text_of = dict(zip(used.tolist(), texts.take(pa.array(used)).to_pylist(), strict=True))
        names = sorted(set(text_of.values()))
        index = {name: position for position, name in enumerate(names)}
        order = np.zeros(len(texts), np.int32)
        order[used] = [index[text_of[code]] for code in used.tolist()]
        return order[codes], names


def _read_table(path: Path) -> _Manifest:
    suffix = path.suffix.lower()
    try:
        if suffix == ".csv":
            return _Manifest(path, _read_csv(path), first_row=2)
        if suffix == ".parquet":
            return _Manifest(path, _read_parquet(path), first_row=1)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, "") from error
    except (pa.ArrowException, csv.Error) as error:
        reason = " ".join(str(error).split())
        if "invalid UTF8" in reason:
            raise _not_utf8(path, f" ({reason})") from error
        raise DataError(
            f"{path} cannot be read as {suffix[1:]} ({reason}): expected a table with the columns {_expected_columns()}"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}): name a manifest's file") from error
    raise DataError(f"{path} ends in {path.suffix!r}: expected a manifest that ends in .csv or .parquet")


def _not_utf8(path: Path, details: str) -> DataError:
    return DataError(f"{path} is no UTF-8 text{details}: save it with the encoding UTF-8")


def _read_csv(path: Path) -> dict[str, pa.Array]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        header: list[str] = next((row for row in csv.reader(file) if row), [])
    columns = _known_columns(path, header)
    convert = pa.csv.ConvertOptions(
        include_columns=columns,
        column_types={name: pa.string() if name == "path" else _DICTIONARY for name in columns},
    )
    # One thread: errors then name the row, less memory is held, and a million rows take about a second.
    return _columns(
        path,
        pa.csv.read_csv(
            path,
            read_options=pa.csv.ReadOptions(use_threads=False),
            parse_options=pa.csv.ParseOptions(newlines_in_values=True),
            convert_options=convert,
        ),
    )


def _read_parquet(path: Path) -> dict[str, pa.Array]:
    with path.open("rb") as file:
        schema = pa.parquet.read_schema(file)
        columns = _known_columns(path, schema.names)
        texts = [name for name in columns if name != "path" and pa.types.is_string(schema.field(name).type)]
        content = pa.parquet.ParquetFile(file, read_dictionary=texts)
        return _columns(path, content.read(columns=columns, use_threads=False))


def _columns(path: Path, table: pa.Table) -> dict[str, pa.Array]:
    if len(table) == 0:
        raise DataError(f"{path} has no rows: expected one for each image, with the columns {_expected_columns()}")
    # A column's pieces are let go once they are put together, the paths' last, and what arrow keeps in reserve is given
    # back: a million rows then take 200 MB at the peak instead of 250.
    pieces = dict(zip(table.column_names, table.columns, strict=True))
    del table
    columns = {}
    for name in reversed(list(pieces)):
        column = pieces.pop(name)
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        if not (is_text or pa.types.is_null(kind) or (pa.types.is_integer(kind) and name != "path")):
            expected = "text" if name == "path" else "text or whole numbers"
            raise DataError(f"column {name!r} of {path} has the type {kind}: expected {expected}; convert it")
        if name == "path" or column.type != _DICTIONARY:
            column = column.cast(pa.string())
        if name != "path" and column.type != _DICTIONARY:
            column = column.dictionary_encode()
        columns[name] = column.combine_chunks()
        del column
        pa.default_memory_pool().release_unused()
    return columns


def _known_columns(path: Path, found: Sequence[str]) -> list[str]:
    """The columns to read, in the order path, label, domain, split, group.

    Raises:
        DataError: a column that is missing or stands there twice.
    """
    known = (*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS)
    others = {name.strip().lower(): name for name in found if name not in known}
    missing = [name for name in REQUIRED_COLUMNS if name not in found]
    if missing:
        hints = []
        for name in missing:
            near = difflib.get_close_matches(name, others, n=1)
            hints.append(f"{name!r} (called {others[near[0]]!r}?)" if near else repr(name))
        is_split_otherwise = path.suffix.lower() == ".csv" and any(mark in "".join(found) for mark in ";\t")
        raise DataError(
            f"{path} lacks the {'column' if len(missing) == 1 else 'columns'} {', '.join(hints)}: found "
            f"{_few([repr(name) for name in found], 20) or 'none'}; expected {_expected_columns()}"
            f"{', with commas between the columns' if is_split_otherwise else ''}"
        )
    twice = [name for name in known if found.count(name) > 1]
    if twice:
        raise DataError(f"{path} has the column {twice[0]!r} {found.count(twice[0])} times: expected it once")
    for lower, name in others.items():
        near = difflib.get_close_matches(lower, [column for column in OPTIONAL_COLUMNS if column not in found], n=1)
        if near:
            logger.warning("%s: column %r is ignored; if it is meant, call it %r", path, name, near[0])
    return [name for name in known if name in found]


def _expected_columns() -> str:
    return f"{', '.join(REQUIRED_COLUMNS)} and, if wanted, {', '.join(OPTIONAL_COLUMNS)}"


def _relative_paths(paths: pa.StringArray, root: Path) -> pa.StringArray:
    """Paths without detours, and relative if they lie below the root, so that they name a file in one way.

    As everywhere in this module no file is looked at: ``..`` after a link is taken as if the link were a folder.
    """
    prefix = root.as_posix().rstrip("/") + "/"
    detours = pc.or_(pc.match_substring(paths, "./"), pc.match_substring(paths, "//")).fill_null(False)
    if pc.any(detours).as_py():
        straight = pa.array((_straight(path, prefix) for path in _iterate(paths.filter(detours))), pa.string())
        paths = pc.replace_with_mask(paths, detours, straight)
    below = pc.starts_with(paths, prefix)
    if not pc.any(below).as_py():
        return paths
    return pc.if_else(below, pc.utf8_slice_codeunits(paths, len(prefix)), paths)


def _straight(path: str, prefix: str) -> str:
    path = posixpath.normpath(path)
    if path.startswith("//"):  # which POSIX leaves open, and systems take for one
        path = path[1:]
    if path.startswith("../"):  # may lead back to the root
        whole = posixpath.normpath(prefix + path)
        return whole if whole.startswith(prefix) else path
    return path


def _is_blank(texts: pa.StringArray) -> NDArray[np.bool_]:
    """Where an array of texts is null, empty or white space."""
    blank = pc.or_(pc.equal(pc.binary_length(texts), 0), pc.utf8_is_space(texts))
    result: NDArray[np.bool_] = blank.fill_null(True).to_numpy(zero_copy_only=False)
    return result


def _dictionary_codes(column: pa.DictionaryArray) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Index of each row into the dictionary, and where the row is empty (its index may be -1 there)."""
    codes: NDArray[np.int32] = column.indices.fill_null(-1).to_numpy()
    blank = np.append(_is_blank(column.dictionary), True)  # the last for -1
    return codes, blank[codes]


def _out_split(manifest: _Manifest) -> NDArray[np.bool_]:
    codes, values = manifest.text_codes("split")
    for code, value in enumerate(values):
        if value in OUT_SPLIT:
            continue
        where = f"split {value!r} in {manifest.rows(np.flatnonzero(codes == code).tolist())} of {manifest.path}"
        if value == "test":
            raise DataError(
                f"{where}: a domain has an in-split to train on and an out-split to validate on, but no test split; "
                "give test images a domain of their own and hold it out with --test-domain, or leave them out"
            )
        raise DataError(f"{where}: expected {', '.join(OUT_SPLIT)}")
    return np.array([OUT_SPLIT[value] for value in values])[codes]


def _group_codes(manifest: _Manifest, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Codes of the groups in the order of ``rows``, numbered as they appear there."""
    codes, empty = _dictionary_codes(manifest.columns["group"])
    # Every empty cell becomes a group of its own, numbered after those that have a name.
    groups = np.where(empty, len(manifest.columns["group"].dictionary) + np.arange(len(codes), dtype=np.int32), codes)
    groups = groups[rows]
    number_of = np.full(groups.max() + 1, -1)
    # Of several values for one entry the last is assigned: where a group appears first.
    number_of[groups[::-1]] = np.arange(len(groups))[::-1]
    appeared = np.flatnonzero(number_of >= 0)
    number_of[appeared[np.argsort(number_of[appeared])]] = np.arange(len(appeared))
    return number_of[groups]


def _check_unique(
    manifest: _Manifest,
    paths: pa.StringArray,
    order: NDArray[np.int64],
    columns: Mapping[str, tuple[NDArray[np.int32], list[str]]],
) -> None:
    """Raises DataError for a path that stands in several rows; ``order`` are the rows sorted by path."""
    repeats = _repeats(paths, order)
    if len(repeats) == 0:
        return
    breaks = np.flatnonzero(np.diff(repeats) > 1)
    last = repeats[breaks[0]] if len(breaks) else repeats[-1]
    rows = order[repeats[0] - 1 : last + 1]
    differing = []
    for column, (codes, names) in columns.items():
        values = [names[code] for code in np.unique(codes[rows])]
        if len(values) > 1:
            differing.append(f"{column}s {_few([repr(value) for value in values], 5)}")
    different = f" with different {' and '.join(differing)}" if differing else ""
    more = f" (and {len(breaks):,} more paths stand there several times)" if len(breaks) else ""
    raise DataError(
        f"path {paths[int(rows[0])].as_py()!r} stands in {manifest.rows(rows.tolist())} of {manifest.path}"
        f"{different}{more}: expected one row for each image; remove the others"
    )


def _repeats(paths: pa.StringArray, order: NDArray[np.int64], batch: int = 65_536) -> NDArray[np.int64]:
    """Positions in ``order`` at which a path equals the one before."""
    found = []
    for start in range(1, len(order), batch):
        these = paths.take(pa.array(order[start - 1 : start + batch]))
        equal = pc.equal(these.slice(1), these.slice(0, len(these) - 1))
        found.append(start + np.flatnonzero(equal.to_numpy(zero_copy_only=False)))
    return np.concatenate([np.empty(0, np.int64), *found])


def _file_size(root: Path, path: str, missing: list[str]) -> int:
    try:
        found = (root / path).stat()
        if stat.S_ISREG(found.st_mode):
            return found.st_size
    except (OSError, ValueError):  # ValueError: a path with a null character
        pass
    missing.append(path)
    return 0


def _iterate(paths: pa.StringArray, batch: int = 4096) -> Iterator[str]:
    """Paths one by one, without a list of them all."""
    for start in range(0, len(paths), batch):
        yield from paths.slice(start, batch).to_pylist()


def _text_buffers(texts: pa.StringArray) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Where each text begins and the last ends, and the UTF-8 bytes of all."""
    _, offset_buffer, text_buffer = texts.buffers()
    offsets = np.frombuffer(offset_buffer, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    return offsets, np.frombuffer(text_buffer, np.uint8)[offsets[0] : offsets[-1]]


def _count(items: Sequence[str], kind: str, what: str) -> str:
    return f"{len(items):,} {kind}{'' if len(items) == 1 else 's'} {what}, such as {min(items)!r}"


def _few(items: Sequence[str], limit: int, last: str = ", ") -> str:
    """The first of many items for a message, and how many more there are."""
    if len(items) > limit:
        return f"{', '.join(items[:limit])} and {len(items) - limit:,} more"
    return last.join(filter(None, [", ".join(items[:-1]), *items[-1:]]))
