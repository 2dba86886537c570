"""Decoded images, kept on disk or in memory so that a file is decoded once.

On disk, ``FOLDER/v1-SIDExCHANNELS/`` holds what was decoded with this shorter side and number of channels, whatever
data set it belongs to:

- ``parts/ID/`` are images that were decoded together. ``pixels`` has them one after the other, each
  ``[row, column, channel]``; ``index`` has the SHA-256 of each image's file and where its pixels lie. A part never
  changes.
- ``lists/ID/files`` has, for a list of paths, the size, modification time and SHA-256 of each file and where its pixels
  lie. As long as sizes and times stay what they were, nothing else is read.

Parts are written as images get decoded, so a build that is interrupted goes on where it was.

An image is known by its file's content, not by the data set it is in. A data set that was moved, a part of one, or one
with some new files finds the pixels that are there, and only what is new is decoded and written.

A file that was edited and has the same size and modification time as before is not noticed. When files of a list
changed, parts that no list refers to any more are removed; apart from that nothing is: delete the folder to free its
space. Processes that fill the same folder take turns.
"""

import errno
import hashlib
import io
import logging
import os
import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, get_args

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from fishr.data.image_format import ImageFormat, read_image
from fishr.devices import num_cpus
from fishr.errors import DataError, UnreadableImageError
from fishr.files import new_folder, remove_leftovers
from fishr.registry import unknown

VERSION = 1
"""Of the files' layout and of how images are decoded: raise it when either changes."""

PARTS, PIXELS, INDEX = "parts", "pixels", "index"
LISTS, FILES = "lists", "files"
LOCK, UNFINISHED = ".lock", ".pixels"

LOCATION = np.dtype([("part", np.int32), ("offset", np.int64), ("rows", np.int32), ("columns", np.int32)])
IMAGE = np.dtype([("digest", "V32"), ("location", LOCATION)])
STAT = np.dtype([("size", np.int64), ("mtime_ns", np.int64)])
FILE = np.dtype([("stat", STAT), ("digest", "V32"), ("location", LOCATION)])
PART = np.dtype([("name", "U32"), ("bytes", np.int64)])

PART_BYTES, PART_IMAGES = 2**30, 20_000
"""A part with as many bytes or images is finished: what a build that is killed loses at most..."""

LARGEST_SHARE = 1 / 32
"""... or this share of all before it, if that is more: each part takes a file descriptor, of which there are few."""

PATHS_PER_TASK = 8
"""Images that a thread decodes in a row: each task is handed from thread to thread, which takes time."""

TASKS_PER_THREAD = 2
"""Tasks that may be under way or wait to be stored: what bounds the memory that decoding takes."""

SECONDS_BETWEEN_REPORTS = 0.05

CacheMode = Literal["disk", "ram", "none"]
Progress = Callable[[int, int], None]
"""Called with the number of images done and of all images."""

_Decoded = tuple[bytes, NDArray[np.uint8] | None]
"""SHA-256 of a file, and its pixels if they are new."""

logger = logging.getLogger(__name__)


class StoredImages(Protocol):
    """Decoded images, uint8 ``[row, column, channel]`` each and read-only; any number of threads may read them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> NDArray[np.uint8]: ...


def store_images(
    paths: Sequence[Path],
    format: ImageFormat,
    mode: CacheMode,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> StoredImages:
    """Images in the form that ``format`` stores them in.

    Args:
        paths: The image files.
        format: How to decode them.
        mode: "disk" decodes what the folder does not have yet and maps it into memory; "ram" decodes all into memory;
            "none" decodes an image whenever it is asked for, and notices only then that it cannot be read.
        folder: Where "disk" keeps them; default :func:`cache_root`.
        progress: Called as images get ready, at most 20 times a second, and at last with all of them; never called
            when nothing has to be read.

    Raises:
        ConfigError: an unknown mode.
        DataError: images that cannot be read, a folder that cannot be used, too little space there or in memory.
    """
    if mode == "none":
        return _DecodedEachTime(list(paths), format)
    if mode == "ram":
        return _in_memory(paths, format, progress)
    if mode == "disk":
        return _on_disk(paths, format, cache_root() if folder is None else folder, progress)
    raise unknown("cache", mode, get_args(CacheMode))


def cache_root() -> Path:
    """The folder of cached images: ``$FISHR_CACHE``, else ``fishr/images`` in the user's cache folder."""
    if named := os.environ.get("FISHR_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fishr" / "images"


class _DecodedEachTime:
    def __init__(self, paths: Sequence[Path], format: ImageFormat) -> None:
        self._paths, self._format = paths, format

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        path = self._paths[index]
        try:
            image = read_image(path, self._format)
        except UnreadableImageError as error:
            raise DataError(f"{path} cannot be read ({error}): repair or remove it") from error
        image.setflags(write=False)
        return image


class _Pixels:
    """Images that lie in arrays of bytes, one array for each part."""

    def __init__(self, parts: Sequence[NDArray[np.uint8]], locations: NDArray[np.void], channels: int) -> None:
        self._parts, self._channels = parts, channels
        self._locations = np.ascontiguousarray(locations)

    def __len__(self) -> int:
        return len(self._locations)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        part, offset, rows, columns = self._locations[index].tolist()
        pixels = self._parts[part][offset : offset + rows * columns * self._channels]
        image: NDArray[np.uint8] = pixels.reshape(rows, columns, self._channels)
        return image


def _in_memory(paths: Sequence[Path], format: ImageFormat, progress: Progress | None) -> _Pixels:
    file = io.BytesIO()
    part = _Part(file)
    decoding = _Decoding({}, 0)
    try:
        decoding.run(paths, part.append, format, _Reports(progress, 0, len(paths)))
    except MemoryError as error:
        raise DataError(
            f"the images do not fit into memory{_needed(decoding, len(paths))}: use --cache disk or --cache none"
        ) from error
    _check_readable(decoding, len(paths))
    pixels = np.frombuffer(file.getbuffer(), np.uint8)
    pixels.setflags(write=False)
    return _Pixels([pixels], np.array(part.images, IMAGE)["location"][decoding.numbers], format.channels)


def _on_disk(paths: Sequence[Path], format: ImageFormat, folder: Path, progress: Progress | None) -> _Pixels:
    store = folder / f"v{VERSION}-{format.shorter_side}x{format.channels}"
    names = "\0".join(str(path.absolute()) for path in paths)
    record = store / LISTS / hashlib.sha256(names.encode(errors="surrogatepass")).hexdigest()
    stats = np.fromiter(map(_stat, paths), STAT, len(paths))
    try:
        images = _recall(store, record, stats, format)
        if images is None:
            store.mkdir(parents=True, exist_ok=True)
            with _alone(store):
                # Another process may have been first.
                images = _recall(store, record, stats, format)
                if images is None:
                    _fill(store, record, paths, stats, format, progress)
                    images = _recall(store, record, stats, format)
    except OSError as error:
        raise _unusable(folder, error) from error
    if images is None:
        raise DataError(f"the image cache {folder} was changed while it was filled: run again, or use --cache ram")
    return images


def _recall(store: Path, record: Path, stats: NDArray[np.void], format: ImageFormat) -> _Pixels | None:
    """The images if all of them are there and no file has changed."""
    arrays = _read_arrays(record / FILES)
    if arrays is None:
        return None
    parts, files = arrays
    if not (files["stat"] == stats).all():
        return None
    pixels = []
    for name, num_bytes in parts.tolist():
        path = store / PARTS / name / PIXELS
        try:
            if path.stat().st_size != num_bytes:
                return None
            # Without its class, which would make each image slower to take out.
            pixels.append(np.asarray(np.memmap(path, np.uint8, "r")))
        except FileNotFoundError:
            return None
    return _Pixels(pixels, files["location"], format.channels)


def _fill(
    store: Path,
    record: Path,
    paths: Sequence[Path],
    stats: NDArray[np.void],
    format: ImageFormat,
    progress: Progress | None,
) -> None:
    """Decode what is not there into new parts and write the list's record; nobody else may do so at the same time."""
    for folder in (store / PARTS, store / LISTS):
        remove_leftovers(folder, "*")
    parts, images = _whole_parts(store, format)
    known = dict(zip(images["digest"].tolist(), range(len(images)), strict=True))
    numbers = np.full(len(paths), -1)
    before = _read_arrays(record / FILES)
    if before is not None:
        _, files = before
        same = files["stat"] == stats
        numbers[same] = [known.get(digest, -1) for digest in files["digest"][same].tolist()]
    elif record.exists():
        logger.warning("%s is damaged; the files it lists are read again", record)
    todo = np.flatnonzero(numbers < 0).tolist()

    decoding = _Decoding(known, len(images))
    new_parts = _NewParts(store, len(parts), format.channels)
    try:
        reports = _Reports(progress, len(paths) - len(todo), len(paths))
        try:
            decoding.run([paths[index] for index in todo], new_parts.append, format, reports)
        except OSError:  # the disk is full, or gone: not the time to write more
            raise
        except BaseException:
            with suppress(OSError):
                new_parts.finish()
            raise
        new_parts.finish()
        images = np.concatenate([images, *new_parts.images])
        parts = np.append(parts, np.array(new_parts.parts, PART))
        # Only now: what could be read need not be decoded again when the rest is repaired.
        _check_readable(decoding, len(paths))
        numbers[todo] = decoding.numbers

        files = np.empty(len(paths), FILE)
        files["stat"] = stats
        files["digest"] = images["digest"][numbers]
        files["location"] = images["location"][numbers]
        used, files["location"]["part"] = np.unique(files["location"]["part"], return_inverse=True)
        with new_folder(record) as aside:
            _write_arrays(aside / FILES, parts[used], files)
        if before is not None:
            _remove_unused_parts(store)
    except OSError as error:
        raise _unusable(store.parent, error, _needed(decoding, len(todo))) from error
    finally:
        new_parts.discard()


def _whole_parts(store: Path, format: ImageFormat) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """All parts and the images in them; damaged parts are removed with a warning."""
    parts: list[tuple[str, int]] = []
    images = [np.empty(0, IMAGE)]
    for folder in sorted((store / PARTS).glob("*/")):
        arrays = _read_arrays(folder / INDEX)
        if arrays is not None:
            (found,) = arrays
            num_bytes = _num_bytes(found, format.channels)
            pixels = folder / PIXELS
            if pixels.exists() and pixels.stat().st_size == num_bytes:
                found["location"]["part"] = len(parts)
                parts.append((folder.name, num_bytes))
                images.append(found)
                continue
        logger.warning("%s is damaged; the images in it are decoded again", folder)
        shutil.rmtree(folder, ignore_errors=True)
    return np.array(parts, PART), np.concatenate(images)


def _num_bytes(images: NDArray[np.void], channels: int) -> int:
    rows, columns = images["location"]["rows"].astype(np.int64), images["location"]["columns"]
    return int((rows * columns).sum()) * channels


def _remove_unused_parts(store: Path) -> None:
    used = set()
    for record in (store / LISTS).glob("*/"):
        arrays = _read_arrays(record / FILES)
        if arrays is not None:
            used.update(arrays[0]["name"].tolist())
    for folder in (store / PARTS).glob("*/"):
        if folder.name not in used:
            shutil.rmtree(folder, ignore_errors=True)


class _Reports:
    """Counts images and tells the caller, not too often."""

    def __init__(self, progress: Progress | None, done: int, total: int) -> None:
        self.progress, self.done, self.total = progress, done, total
        self.last = -np.inf

    def one_more(self) -> None:
        self.done += 1
        now = time.monotonic()
        if self.progress and (self.done == self.total or now - self.last >= SECONDS_BETWEEN_REPORTS):
            self.progress(self.done, self.total)
            self.last = now


@dataclass
class _Part:
    """Images one after the other in a file.

    Attributes:
        file: The file.
        images: Digest and location of each image.
        num_bytes: Size of the file.
    """

    file: BinaryIO
    images: list[tuple[bytes, tuple[int, int, int, int]]] = field(default_factory=list)
    num_bytes: int = 0

    def append(self, digest: bytes, pixels: NDArray[np.uint8]) -> None:
        self.file.write(np.ascontiguousarray(pixels).data)
        # Nothing counts before this line, should an interrupt come in between.
        self.images.append((digest, (0, self.num_bytes, pixels.shape[0], pixels.shape[1])))
        self.num_bytes += pixels.nbytes


class _NewParts:
    """Parts on disk that images are put into, each finished once it is large enough.

    Attributes:
        parts: Name and size of each finished part.
        images: The images of each finished part, as in its index, but with the part's number.
    """

    def __init__(self, store: Path, first: int, channels: int) -> None:
        self.parts: list[tuple[str, int]] = []
        self.images: list[NDArray[np.void]] = []
        self._store, self._first, self._channels = store, first, channels
        self._part: _Part | None = None

    def append(self, digest: bytes, pixels: NDArray[np.uint8]) -> None:
        if self._part is None:
            self._part = _Part((self._store / UNFINISHED).open("wb"))
        self._part.append(digest, pixels)
        bytes_before = sum(num_bytes for _, num_bytes in self.parts)
        images_before = sum(map(len, self.images))
        if self._part.num_bytes >= max(PART_BYTES, LARGEST_SHARE * bytes_before) or len(self._part.images) >= max(
            PART_IMAGES, LARGEST_SHARE * images_before
        ):
            self.finish()

    def finish(self) -> None:
        """Make a part of the images that are in none yet."""
        part, self._part = self._part, None
        if part is None:
            return
        images = np.array(part.images, IMAGE)
        num_bytes = _num_bytes(images, self._channels)
        with part.file as file:
            file.truncate(num_bytes)  # an interrupted image may have left some bytes
        if len(images):
            name = uuid.uuid4().hex
            with new_folder(self._store / PARTS / name) as aside:
                (self._store / UNFINISHED).rename(aside / PIXELS)
                _write_arrays(aside / INDEX, images)
            images["location"]["part"] = self._first + len(self.parts)
            self.images.append(images)
            self.parts.append((name, num_bytes))

    def discard(self) -> None:
        """Remove the images that are in no part."""
        if self._part is not None:
            with suppress(OSError):  # what is buffered finds no space
                self._part.file.close()
        (self._store / UNFINISHED).unlink(missing_ok=True)


@dataclass
class _Decoding:
    """Images that are decoded, each content once.

    Attributes:
        known: The SHA-256 of each image that need not be decoded, and its number; those that are decoded are added.
        next_number: The number that the next new image gets.
        numbers: The number of each path's image, -1 where it cannot be read.
        failures: Paths that cannot be read, each with the reason.
        num_bytes: Size of what was decoded.
    """

    known: dict[bytes, int]
    next_number: int
    numbers: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    num_bytes: int = 0

    def run(
        self,
        paths: Sequence[Path],
        append: Callable[[bytes, NDArray[np.uint8]], None],
        format: ImageFormat,
        reports: _Reports,
    ) -> None:
        """Decode in as many threads as there are CPUs; the caller's thread appends, in the order of ``paths``."""
        threads = num_cpus()
        with ThreadPoolExecutor(threads, thread_name_prefix="fishr-decode") as pool:
            tasks = (
                pool.submit(self._decode_all, paths[start : start + PATHS_PER_TASK], format)
                for start in range(0, len(paths), PATHS_PER_TASK)
            )
            done = (image for task in _looking_ahead(tasks, TASKS_PER_THREAD * threads) for image in task.result())
            for path, image in zip(paths, done, strict=True):
                if isinstance(image, UnreadableImageError):
                    self.failures.append(f"{path} ({image})")
                    self.numbers.append(-1)
                else:
                    digest, pixels = image
                    # Another file with the same content may have come in between.
                    if pixels is not None and digest not in self.known:
                        append(digest, pixels)
                        self.known[digest] = self.next_number
                        self.num_bytes += pixels.nbytes
                        self.next_number += 1
                    self.numbers.append(self.known[digest])
                reports.one_more()

    def _decode_all(self, paths: Sequence[Path], format: ImageFormat) -> list[_Decoded | UnreadableImageError]:
        images: list[_Decoded | UnreadableImageError] = []
        for path in paths:
            try:
                images.append(self._decode(path, format))
            except UnreadableImageError as error:
                images.append(error)
        return images

    def _decode(self, path: Path, format: ImageFormat) -> _Decoded:
        try:
            content = path.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise UnreadableImageError(getattr(error, "strerror", None) or str(error)) from error
        digest = hashlib.sha256(content).digest()
        return digest, None if digest in self.known else format.decode(content)


def _looking_ahead(tasks: Iterable[Future[Any]], ahead: int) -> Iterator[Future[Any]]:
    """The tasks in order, each after as many more were started."""
    pending: deque[Future[Any]] = deque()
    for task in tasks:
        pending.append(task)
        if len(pending) > ahead:
            yield pending.popleft()
    while pending:
        yield pending.popleft()


@contextmanager
def _alone(store: Path) -> Iterator[None]:
    """Keep other processes and threads from filling the store; the system takes the lock from a process that dies."""
    lock = FileLock(store / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("waiting for another process that fills the image cache %s", store)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _write_arrays(path: Path, *arrays: NDArray[np.void]) -> None:
    """Arrays one after the other, behind the SHA-256 of them all."""
    content = io.BytesIO()
    for array in arrays:
        np.save(content, array)
    with path.open("wb") as file:
        file.write(hashlib.sha256(content.getbuffer()).digest())
        file.write(content.getbuffer())


def _read_arrays(path: Path) -> list[NDArray[np.void]] | None:
    """The arrays in a file, None if it is missing or damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    digest_bytes = hashlib.sha256().digest_size
    if hashlib.sha256(memoryview(content)[digest_bytes:]).digest() != content[:digest_bytes]:
        return None
    file = io.BytesIO(content)
    file.seek(digest_bytes)
    arrays = []
    while file.tell() < len(content):
        arrays.append(np.load(file))
    return arrays


def _stat(path: Path) -> tuple[int, int]:
    """Size and modification time; a file without them is found to be unreadable when it is read."""
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def _check_readable(decoding: _Decoding, num_images: int) -> None:
    if failures := decoding.failures:
        more = f" and {len(failures) - 3} more" if len(failures) > 3 else ""
        raise DataError(
            f"{len(failures)} of {num_images} images cannot be read: {', '.join(failures[:3])}{more}: "
            "repair or remove them"
        )


def _needed(decoding: _Decoding, num_images: int) -> str:
    """What the images take, to judge by those that were decoded, as the end of a clause."""
    if not decoding.num_bytes:
        return ""
    megabytes = decoding.num_bytes / len(decoding.numbers) * num_images / 1e6
    return f" (they take about {max(megabytes, 1):,.0f} MB)"


def _unusable(folder: Path, error: OSError, needed: str = "") -> DataError:
    others = "name another folder by $FISHR_CACHE, or use --cache ram or --cache none"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(f"there is no space for the images in {folder}{needed}: free some, {others}")
    return DataError(
        f"the image cache {folder} cannot be used ({error.strerror or error}): make it a writable folder, {others}"
    )
