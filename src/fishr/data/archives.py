"""Reading archives that somebody else has made.

No file is ever written to a path that an archive gives: :func:`list_members` looks at all names and sizes and refuses
the whole archive for one that is hostile, :func:`unpack` writes the contents of members to paths of the caller's.
tarfile's own data filter is for ``extract``, which is not used here, and lets absolute paths pass without their slash.
"""

import lzma
import os
import posixpath
import re
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from fishr.errors import DataError

MOST_EXPANSION = 100
"""Times its own size that an archive may unpack to; images are compressed already, annotations shrink to a tenth."""

ALWAYS_ALLOWED = 64 * 2**20
"""Bytes that any archive may unpack to."""

HEADER_BYTES = 512
"""What a member counts at least, so that a million empty ones are no way round the limit."""

CHUNK_BYTES = 2**20
ZIP_MAGIC = b"PK\x03\x04"

_DRIVE = re.compile(r"[A-Za-z]:")
_NO_FILES = {stat.S_IFCHR: "device", stat.S_IFBLK: "device", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}


class Member(NamedTuple):
    """A file in an archive: its path there, with slashes and without detours, and its size in bytes."""

    name: str
    size: int


class DamagedArchiveError(DataError):
    """An archive that is cut off or damaged."""

    def __init__(self, archive: Path, reason: str) -> None:
        super().__init__(
            f"{archive} is cut off, damaged or no archive ({reason}): expected a zip or tar archive; get it again"
        )
        self.archive = archive


def list_members(archive: Path, on_member: Callable[[int], None] | None = None) -> list[Member]:
    """The files in an archive, in its order, once nothing about the archive is found to be hostile.

    Args:
        archive: A zip or tar archive, the latter compressed or not; or a folder of unpacked files.
        on_member: Is told how many members were looked at, as that takes minutes with a large compressed tar.

    Raises:
        DamagedArchiveError: an archive that is cut off, damaged or none.
        DataError: no such file; a member with an absolute path, a drive letter, a backslash or ``..`` in its path, or
            a name that is no UTF-8 or stands there twice; links and devices; encrypted members; more bytes than
            :data:`MOST_EXPANSION` allows.
    """
    if not archive.exists():
        raise DataError(f"no such file: {archive}")
    if archive.is_dir():
        return _list_folder(archive)
    limit = max(ALWAYS_ALLOWED, MOST_EXPANSION * archive.stat().st_size)
    members: list[Member] = []
    names: set[str] = set()
    unpacked = 0
    # Checked member by member: the next one of a compressed tar is reached only by unpacking the one before.
    for entry in _entries(archive):
        name = _checked_name(archive, entry.name)
        if entry.unfit:
            raise _refused(archive, entry.name, entry.unfit)
        unpacked += entry.size + HEADER_BYTES
        if unpacked > limit:
            raise _refused(archive, entry.name, f"brings the unpacked size to more than {limit:,} bytes")
        if entry.is_folder:
            continue
        if name in names:
            raise _refused(archive, entry.name, "stands there twice")
        names.add(name)
        members.append(Member(name, entry.size))
        if on_member is not None:
            on_member(len(members))
    return members


def read_members(archive: Path, names: Collection[str]) -> dict[str, bytes]:
    """The contents of some members.

    Raises:
        DataError: as :func:`list_members`, which has to have accepted the archive.
    """
    return {name: b"".join(chunks) for name, chunks in _contents(archive, names)}


def unpack(archive: Path, places: Mapping[str, Sequence[Path]], on_file: Callable[[], None]) -> None:
    """Write the contents of members to new files, whose folders are made.

    Args:
        archive: What :func:`list_members` has accepted.
        places: Name of each member to unpack, to the files to write.
        on_file: Is called after every member.

    Raises:
        DamagedArchiveError: an archive that is cut off or damaged.
        DataError: a file that is there already or cannot be written.
    """
    for name, chunks in _contents(archive, places):
        first, *others = places[name]
        try:
            first.parent.mkdir(parents=True, exist_ok=True)
            with first.open("xb") as file:
                for chunk in chunks:
                    file.write(chunk)
            for other in others:
                other.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(first, other)
        except OSError as error:
            raise DataError(
                f"{name!r} of {archive} cannot be copied to {first} ({error.strerror or error}): make room there, or "
                "name another place"
            ) from error
        on_file()


class _Entry(NamedTuple):
    name: str
    size: int
    is_folder: bool
    unfit: str
    """Why it cannot be unpacked, as the end of a sentence; empty if it can."""


def _list_folder(folder: Path) -> list[Member]:
    members = []
    for path, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(files):
            whole = Path(path, file)
            name = whole.relative_to(folder).as_posix()
            _check_utf8(folder, name)
            if whole.is_file():
                members.append(Member(name, whole.stat().st_size))
    return members


def _entries(archive: Path) -> Iterator[_Entry]:
    with _damage_explained(archive), _opened(archive) as opened:
        if isinstance(opened, zipfile.ZipFile):
            yield from map(_zip_entry, opened.infolist())
            return
        for info in opened:
            unfit = (
                "" if info.isreg() or info.isdir() else "is a link" if info.issym() or info.islnk() else "is a device"
            )
            yield _Entry(info.name, info.size, info.isdir(), unfit)


def _zip_entry(info: zipfile.ZipInfo) -> _Entry:
    kind = stat.S_IFMT(info.external_attr >> 16)  # the upper half holds the mode, where a Unix program has made it
    unfit = ""
    if stat.S_ISLNK(kind):
        unfit = "is a link"
    elif kind in _NO_FILES:
        unfit = f"is a {_NO_FILES[kind]}"
    elif info.flag_bits & 1:
        unfit = "is encrypted"
    return _Entry(info.filename, info.file_size, info.is_dir(), unfit)


def _contents(archive: Path, names: Collection[str]) -> Iterator[tuple[str, Iterator[bytes]]]:
    """The chunks of some members, in the archive's order, to be read before the next member is asked for."""
    if archive.is_dir():
        for name in sorted(names):
            try:
                with (archive / name).open("rb") as source:
                    yield name, iter(partial(source.read, CHUNK_BYTES), b"")
            except OSError as error:
                raise DataError(f"{archive / name} cannot be read ({error.strerror or error})") from error
        return
    with _opened(archive) as opened:
        infos: Iterable[zipfile.ZipInfo | tarfile.TarInfo] = (
            opened.infolist() if isinstance(opened, zipfile.ZipFile) else _members(archive, opened)
        )
        for info in infos:
            name = posixpath.normpath(info.filename if isinstance(info, zipfile.ZipInfo) else info.name)
            if name in names:
                with _damage_explained(archive):
                    file = _member_file(opened, info)
                with file:
                    yield name, _chunks(archive, file)


def _members(archive: Path, opened: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    with _damage_explained(archive):
        yield from opened


def _member_file(opened: zipfile.ZipFile | tarfile.TarFile, info: zipfile.ZipInfo | tarfile.TarInfo) -> IO[bytes]:
    if isinstance(opened, zipfile.ZipFile):
        return opened.open(info)  # type: ignore[arg-type]
    file = opened.extractfile(info)  # type: ignore[arg-type]
    if file is None:
        raise tarfile.ReadError(f"{info} has no content")
    return file


def _chunks(archive: Path, file: IO[bytes]) -> Iterator[bytes]:
    with _damage_explained(archive):
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


@contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile | tarfile.TarFile]:
    with _damage_explained(archive):
        try:
            opened = zipfile.ZipFile(archive) if zipfile.is_zipfile(archive) else tarfile.open(archive)  # noqa: SIM115
        except tarfile.ReadError:  # tells of every kind of compression that it is not
            with archive.open("rb") as file:
                is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
            raise tarfile.ReadError("a zip without its end" if is_zip else "neither zip nor tar") from None
    with opened:
        yield opened


@contextmanager
def _damage_explained(archive: Path) -> Iterator[None]:
    """What zipfile, tarfile and the decompressors raise for damaged content, most of it without saying so."""
    try:
        yield
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        zlib.error,
        lzma.LZMAError,
        struct.error,
        EOFError,
        OSError,
        OverflowError,
        RuntimeError,
        ValueError,
    ) as error:
        raise DamagedArchiveError(archive, " ".join(str(error).split()) or type(error).__name__) from error


def _checked_name(archive: Path, name: str) -> str:
    """The path of a member without detours.

    Raises:
        DataError: a path that may lead out of the folder it is unpacked to, on one system or another.
    """
    _check_utf8(archive, name)
    if name.startswith("/") or _DRIVE.match(name):
        raise _refused(archive, name, "has an absolute path")
    if "\\" in name:
        raise _refused(archive, name, "has a backslash in its path")
    if ".." in name.split("/"):
        raise _refused(archive, name, "leads out of its folder")
    return posixpath.normpath(name)


def _check_utf8(archive: Path, name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise _refused(archive, name, "has a name that is no UTF-8") from None


def _refused(archive: Path, name: str, reason: str) -> DataError:
    return DataError(
        f"{archive} is refused and nothing of it unpacked, its member {name!r} {reason}: get the archive from where it "
        "was published, or name a folder that you have unpacked it to yourself"
    )
