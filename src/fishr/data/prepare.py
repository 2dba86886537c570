"""Building a benchmark's published layout from the archives that it comes in."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet
from filelock import FileLock, Timeout

from fishr.data.archives import DamagedArchiveError, Member, list_members, read_members, unpack
from fishr.data.listing import (
    BENCHMARKS,
    IMAGE_SUFFIXES,
    JUNK,
    LAYOUT,
    BenchmarkLayout,
    ImageListing,
    list_benchmark,
    list_folder,
    published_differences,
)
from fishr.errors import DataError
from fishr.files import new_folder, remove_leftovers
from fishr.registry import unknown

logger = logging.getLogger(__name__)

FilesProgress = Callable[[str, int, int | None], None]
"""``(what is done, files that are done, files in all or None if unknown)``."""

DOWNLOADS = ".downloads"
"""Folder in the data root for what is being downloaded, and for locks."""

ALIASES: Mapping[str, Mapping[str, str]] = {
    "vlcs": {"caltech": "Caltech101", "pascal": "VOC2007", "voc": "VOC2007", "sun": "SUN09"},
}
"""What domains are called in other archives of a benchmark."""

WHOLE_SPLIT, SPLITS = "full", ("train", "val", "crossval", "test")
"""Folders between domain and class in older archives: one with all images, or several that they are divided into."""

TERRA_CLASSES = frozenset(
    {"bird", "bobcat", "cat", "coyote", "dog", "empty", "opossum", "rabbit", "raccoon", "squirrel"}
)
"""Categories of Caltech Camera Traps that DomainBed has kept, as it has kept four locations."""

TABLE_COLUMNS, TABLE_BATCH = ["image", "domain", "label"], 64
PNG_MAGIC = b"\x89PNG"


class Prepared(NamedTuple):
    """A benchmark that is complete, and whether it was so before."""

    listing: ImageListing
    was_there: bool


class Place(NamedTuple):
    """Where an image goes: ``DOMAIN/CLASS/file``."""

    domain: str
    class_name: str
    file: str


Contents = Mapping[Path, Sequence[Member]]
"""The files in each archive."""

Plan = dict[Path, dict[str, list[Place]]]
"""For each archive, its members that are wanted, and where they go."""


def prepare_benchmark(
    name: str, archives: Sequence[Path], root: Path, *, on_files: FilesProgress | None = None
) -> Prepared:
    """Build one of the benchmarks in the data root, from archives that are left as they are.

    The folders of the domains may lie anywhere in the archives, and may have folders for train, test and the like in
    them. Recognised are also: for Terra Incognita the images and COCO-like annotation files of the ECCV 2018 subset of
    Caltech Camera Traps, where an image with animals of two classes goes into both; a Parquet table with the columns
    image, domain and label; and a text file (.txt) with paths DOMAIN/CLASS/image, one a line, of images to leave out,
    as DomainBed has one of the duplicates in DomainNet.

    Nothing appears under the benchmark's name before its numbers of domains, classes and images are the published ones.

    Args:
        name: Name of the benchmark.
        archives: Zip or tar archives, folders of unpacked files, Parquet files, lists.
        root: The data root.
        on_files: Is told how many files are read and how many images written.

    Returns:
        The benchmark; it may have been there before, and complete.

    Raises:
        ConfigError: no such benchmark.
        DataError: archives that are damaged, hostile or hold something else; a folder of the benchmark that is there
            and not complete; no room on the disk.
    """
    if listing := complete_benchmark(name, root):
        return Prepared(listing, was_there=True)
    with alone(name, root):
        if listing := complete_benchmark(name, root):  # built by another process meanwhile
            return Prepared(listing, was_there=True)
        return Prepared(build_benchmark(name, archives, root, on_files), was_there=False)


@contextmanager
def alone(name: str, root: Path) -> Iterator[Path]:
    """Keep other processes from building the same benchmark; gives the folder for downloads, which need not exist.

    Raises:
        DataError: the data root cannot be written to.
    """
    downloads = root / DOWNLOADS
    try:
        downloads.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{downloads} cannot be made ({error.strerror}): name another data root") from error
    lock = FileLock(downloads / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process is busy with %s in %s: waiting for it", name, root)
        lock.acquire()
    try:
        yield downloads / name
    finally:
        lock.release()


def complete_benchmark(name: str, root: Path) -> ImageListing | None:
    """The benchmark if it is there, None if there is nothing in its place.

    Raises:
        ConfigError: no such benchmark.
        DataError: its folder is there and not as published.
    """
    if name not in BENCHMARKS:
        raise unknown("benchmark", name, BENCHMARKS)
    folder = root / BENCHMARKS[name].folder
    if not folder.exists():
        return None
    try:
        return list_benchmark(name, root)
    except DataError as error:
        raise DataError(f"{error}; to have it built anew, rename or delete {folder} first") from error


def build_benchmark(
    name: str, archives: Sequence[Path], root: Path, on_files: FilesProgress | None = None
) -> ImageListing:
    """What :func:`prepare_benchmark` does where there is no such folder and nobody else is at it."""
    folder = root / BENCHMARKS[name].folder
    tables = [archive for archive in archives if archive.suffix.lower() == ".parquet"]
    lists = [archive for archive in archives if archive.suffix.lower() == ".txt"]
    contents = {
        archive: list_members(archive, on_files and partial(_tell_read, on_files, archive))
        for archive in dict.fromkeys(archives)
        if archive not in (*tables, *lists)
    }
    plan = _plan(name, contents)
    if not tables and not any(plan.values()):
        raise DataError(_nothing_found(name, archives, contents))
    _leave_out(plan, lists)
    _check_room(plan, contents, tables, root)
    remove_leftovers(root, BENCHMARKS[name].folder)
    try:
        with new_folder(folder) as aside:
            _write_members(plan, aside, f"writing {name}", on_files)
            for table in tables:
                _write_table(name, table, aside, on_files)
            listing = list_folder(aside)
            differences = published_differences(name, listing)
            if differences:
                raise DataError(
                    f"{', '.join(map(str, archives))}: not {name} as published ({'; '.join(differences)}), nothing was "
                    "kept; bring all of its archives, or name a folder of your own where you train: fishr train --data"
                )
    except OSError as error:
        raise DataError(f"{name} cannot be written to {root} ({error.strerror or error}): make room there") from error
    return replace(listing, name=name, root=folder.absolute())


def _tell_read(on_files: FilesProgress, archive: Path, members: int) -> None:
    on_files(f"reading {archive.name}", members, None)


def _plan(name: str, contents: Contents) -> Plan:
    """Where the members go: as the folders that they lie in say, or else as annotation files do.

    Raises:
        DataError: two members for one place.
    """
    plan = _plan_by_folders(name, contents)
    if name == "terra-incognita" and not any(plan.values()):
        plan = _plan_by_annotations(BENCHMARKS[name], contents)
    origins: dict[Place, str] = {}
    for archive, members in plan.items():
        for member, places in members.items():
            for place in places:
                other = origins.setdefault(place, f"{member!r} of {archive}")
                if other != f"{member!r} of {archive}":
                    raise DataError(
                        f"{other} and {member!r} of {archive} are both {'/'.join(place)}: bring every image once"
                    )
    return plan


def _plan_by_folders(name: str, contents: Contents) -> Plan:
    domains = {_key(alias): domain for alias, domain in ALIASES.get(name, {}).items()}
    domains |= {_key(domain): domain for domain in BENCHMARKS[name].domains}
    found = [
        (archive, member.name, *placed)
        for archive, members in contents.items()
        for member in members
        if (placed := _place_by_folders(PurePosixPath(member.name).parts, domains))
    ]
    whole = {place.domain for _, _, place, split in found if split == WHOLE_SPLIT}
    plan: Plan = {}
    for archive, member, place, split in found:
        if split in SPLITS and place.domain in whole:
            continue
        if split in SPLITS:  # each numbers its images from 1
            place = place._replace(file=f"{split}_{place.file}")
        plan.setdefault(archive, {})[member] = [place]
    return plan


def _place_by_folders(parts: Sequence[str], domains: Mapping[str, str]) -> tuple[Place, str] | None:
    """Place and split of an image in ``.../DOMAIN/[SPLIT/]CLASS/file``, None for other files."""
    if len(parts) < 3 or not _is_image(parts):
        return None
    *_, above, class_name, file = parts
    if domain := domains.get(_key(above)):
        return Place(domain, class_name, file), ""
    split = above.lower()
    if split in (WHOLE_SPLIT, *SPLITS) and len(parts) > 3 and (domain := domains.get(_key(parts[-4]))):
        return Place(domain, class_name, file), split
    return None


def _key(domain: str) -> str:
    """What is the same for RealWorld, "Real World" and real_world."""
    return "".join(filter(str.isalnum, domain)).lower()


def _is_image(parts: Sequence[str]) -> bool:
    """Whether a path is an image's, and not what operating systems leave between them."""
    is_junk = any(part.startswith(".") or part.lower() in JUNK for part in parts)
    return not is_junk and PurePosixPath(parts[-1]).suffix.lower() in IMAGE_SUFFIXES


def _plan_by_annotations(layout: BenchmarkLayout, contents: Contents) -> Plan:
    """Where the images go that the annotation files name.

    An image may have several annotations, and stand in several files; it goes once into every class it has.

    Raises:
        DataError: files that are no annotations, or images that are in no archive.
    """
    images = {
        PurePosixPath(member.name).name: (archive, member.name)
        for archive, members in contents.items()
        for member in members
        if _is_image(PurePosixPath(member.name).parts)
    }
    wanted: set[Place] = set()
    for archive, members in contents.items():
        names = [
            member.name
            for member in members
            if member.name.lower().endswith(".json") and not PurePosixPath(member.name).name.startswith(".")
        ]
        for name, content in read_members(archive, names).items():
            try:
                wanted |= set(_annotated_places(layout, json.loads(content)))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise DataError(
                    f"{name!r} of {archive} is no annotation file ({type(error).__name__}: {error}): expected JSON "
                    "with images (id, file_name, location), annotations (image_id, category_id), categories (id, name)"
                ) from error
    missing = sorted(place.file for place in wanted if place.file not in images)
    if missing:
        raise DataError(
            f"{len(missing):,} of {len(wanted):,} annotated images are in no archive, such as {missing[0]!r}: bring "
            "the archive of the images together with that of the annotations"
        )
    plan: Plan = {}
    for place in sorted(wanted):
        archive, member = images[place.file]
        plan.setdefault(archive, {}).setdefault(member, []).append(place)
    return plan


def _annotated_places(layout: BenchmarkLayout, annotations: Mapping[str, Any]) -> Iterator[Place]:
    classes = {category["id"]: category["name"] for category in annotations["categories"]}
    domains = {
        image["id"]: (f"location_{image['location']}", PurePosixPath(image["file_name"]).name)
        for image in annotations["images"]
    }
    for annotation in annotations["annotations"]:
        domain, file = domains.get(annotation["image_id"], ("", ""))
        if domain in layout.domains and (class_name := classes[annotation["category_id"]]) in TERRA_CLASSES:
            yield Place(domain, class_name, file)


def _leave_out(plan: Plan, lists: Sequence[Path]) -> None:
    """Take the images out of the plan that are listed, those of them that are there.

    Raises:
        DataError: a list that cannot be read.
    """
    listed: set[str] = set()
    for path in lists:
        try:
            listed.update(line.strip() for line in path.read_text(encoding="utf-8").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as a list of images to leave out ({error})") from error
    for members in plan.values():
        for member, places in list(members.items()):
            if all("/".join(place) in listed for place in places):
                del members[member]


def _check_room(plan: Plan, contents: Contents, tables: Sequence[Path], root: Path) -> None:
    needed = sum(table.stat().st_size for table in tables if table.exists())
    for archive, members in plan.items():
        needed += sum(member.size * len(members.get(member.name, ())) for member in contents[archive])
    free = shutil.disk_usage(root).free
    if needed > free:
        raise DataError(
            f"the images take {needed:,} bytes and {root} has {free:,} free: make room, or name another data root"
        )


def _write_members(plan: Plan, folder: Path, what: str, on_files: FilesProgress | None) -> None:
    total = sum(map(len, plan.values()))
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if on_files is not None:
            on_files(what, done, total)

    for archive, members in plan.items():
        unpack(archive, {member: [folder.joinpath(*place) for place in members[member]] for member in members}, count)


def _write_table(name: str, table: Path, folder: Path, on_files: FilesProgress | None) -> None:
    """Write the images of a Parquet file, as they are."""
    domains = {_key(domain): domain for domain in BENCHMARKS[name].domains}
    for row, (total, image, domain_name, class_name) in enumerate(_table_rows(table), start=1):
        domain = domains.get(_key(domain_name))
        if domain is None or not _is_name(class_name):
            raise DataError(
                f"row {row} of {table} has domain {domain_name!r} and label {class_name!r}: expected one of the "
                f"domains {', '.join(BENCHMARKS[name].domains)}, and the name of a class"
            )
        if not image.get("bytes"):
            raise DataError(f"row {row} of {table} has no image: expected the bytes of its file; get the table again")
        class_folder = folder / domain / class_name
        class_folder.mkdir(parents=True, exist_ok=True)
        with _new_file(class_folder, image, row).open("xb") as file:
            file.write(image["bytes"])
        if on_files is not None:
            on_files(f"writing {name}", row, total)


def _table_rows(table: Path) -> Iterator[tuple[int, dict[str, Any], str, str]]:
    """Number of rows in all, and the image, domain and label of each row."""
    try:
        with pyarrow.parquet.ParquetFile(table) as file:
            columns = {name: file.schema_arrow.field(name) for name in TABLE_COLUMNS if name in file.schema_arrow.names}
            if len(columns) < len(TABLE_COLUMNS) or not pa.types.is_struct(columns["image"].type):
                raise DataError(
                    f"{table} has the columns {', '.join(file.schema_arrow.names)}: expected "
                    f"{', '.join(TABLE_COLUMNS)}, the image with bytes and path"
                )
            names = [_class_names(file.schema_arrow, column) for column in TABLE_COLUMNS[1:]]
            for batch in file.iter_batches(TABLE_BATCH, columns=TABLE_COLUMNS):
                for image, *codes in zip(*(batch.column(name).to_pylist() for name in TABLE_COLUMNS), strict=True):
                    texts = [str(known.get(code, code)) for known, code in zip(names, codes, strict=True)]
                    yield file.metadata.num_rows, image or {}, texts[0], texts[1]
    except pa.ArrowException as error:
        raise DamagedArchiveError(table, " ".join(str(error).split())) from error


def _class_names(schema: pa.Schema, column: str) -> dict[int, str]:
    """What the whole numbers in a column stand for, which the hub's datasets keep in the metadata of the schema."""
    try:
        feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]
        return dict(enumerate(feature.get("names", ())))
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _new_file(folder: Path, image: Mapping[str, Any], row: int) -> Path:
    """The name that the image had, on which the order of a listing depends; a number if it had none or it is taken."""
    name = PurePosixPath(image.get("path") or "").name
    if _is_name(name) and _is_image([name]) and not (folder / name).exists():
        return folder / name
    return folder / f"{row:06d}{'.png' if image['bytes'].startswith(PNG_MAGIC) else '.jpg'}"


def _is_name(text: str) -> bool:
    """Whether a text names a file or folder, and does not lead elsewhere."""
    return bool(text) and not text.startswith(".") and not set(text) & set("/\\\0")


def _nothing_found(name: str, archives: Sequence[Path], contents: Contents) -> str:
    found = next((repr(member.name) for members in contents.values() for member in members), "nothing")
    return (
        f"no image of {name} in {', '.join(map(str, archives)) or 'no archive'}: expected {LAYOUT} somewhere in it, "
        f"the domains being {', '.join(BENCHMARKS[name].domains)}; found {found}"
    )
