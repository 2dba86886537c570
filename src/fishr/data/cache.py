"""Decoded images, kept on disk or in memory so that a file is decoded once.

On disk, ``FOLDER/v1-SIDExCHANNELS/`` holds what was decoded with this shorter side and number of channels, whatever
data set it belongs to:

- ``parts/ID/`` are images that were decoded together. ``pixels`` has them one after the other, each
  ``[row, column, channel]``; ``index`` has the SHA-256 of each image's file and where its pixels lie. A part never
  changes.
- ``lists/ID/files`` has, for a list of paths, the size, modification time and SHA-256 of each file and where its pixels
  lie. As long as sizes and times stay what they were, nothing else is read.

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
from contextlib import contextmanager
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

PENDING_PER_THREAD = 4
"""Images that may be read or wait to be stored: what bounds the memory that decoding takes."""

SECONDS_BETWEEN_REPORTS = 0.05

CacheMode = Literal["disk", "ram", "none"]
Progress = Callable[[int, int], None]
"""Called with the number of images done and of all images."""

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
    decoding = _Decoding({}, 0)
    try:
        decoding.run(paths, file, format, _Reports(progress, 0, len(paths)))
    except MemoryError as error:
        raise DataError(
            f"the images do not fit into memory{_needed(decoding, len(paths))}: use --cache disk or --cache none"
        ) from error
    _check_readable(decoding, len(paths))
    pixels = np.frombuffer(file.getbuffer(), np.uint8)
    pixels.setflags(write=False)
    return _Pixels([pixels], np.array(decoding.images, IMAGE)["location"][decoding.numbers], format.channels)


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
    """Decode what is not there as a new part and write the list's record; nobody else may do so at the same time."""
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
    unfinished = store / UNFINISHED
    try:
        with unfinished.open("wb") as file:
            reports = _Reports(progress, len(paths) - len(todo), len(paths))
            decoding.run([paths[index] for index in todo], file, format, reports)
        if decoding.images:
            name = uuid.uuid4().hex
            new_images = np.array(decoding.images, IMAGE)
            with new_folder(store / PARTS / name) as aside:
                unfinished.rename(aside / PIXELS)
                _write_arrays(aside / INDEX, new_images)
            new_images["location"]["part"] = len(parts)
            images = np.concatenate([images, new_images])
            parts = np.append(parts, np.array([(name, decoding.num_bytes)], PART))
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
        unfinished.unlink(missing_ok=True)


def _whole_parts(store: Path, format: ImageFormat) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """All parts and the images in them; damaged parts are removed with a warning."""
    parts: list[tuple[str, int]] = []
    images = [np.empty(0, IMAGE)]
    for folder in sorted((store / PARTS).glob("*/")):
        arrays = _read_arrays(folder / INDEX)
        if arrays is not None:
            (found,) = arrays
            rows, columns = found["location"]["rows"].astype(np.int64), found["location"]["columns"]
            num_bytes = int((rows * columns).sum()) * format.channels
            pixels = folder / PIXELS
            if pixels.exists() and pixels.stat().st_size == num_bytes:
                found["location"]["part"] = len(parts)
                parts.append((folder.name, num_bytes))
                images.append(found)
                continue
        logger.warning("%s is damaged; the images in it are decoded again", folder)
        shutil.rmtree(folder, ignore_errors=True)
    return np.array(parts, PART), np.concatenate(images)


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
class _Decoding:
    """Images that are put one after the other into a file, each content once.

    Attributes:
        known: The SHA-256 of each image that need not be decoded, and its number; those that are decoded are added.
        first: Number of the first image in the file.
        images: Digest and location of each image in the file.
        numbers: The number of each path's image, -1 where it cannot be read.
        failures: Paths that cannot be read, each with the reason.
        num_bytes: Size of the file.
    """

    known: dict[bytes, int]
    first: int
    images: list[tuple[bytes, tuple[int, int, int, int]]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    num_bytes: int = 0

    def run(self, paths: Sequence[Path], file: BinaryIO, format: ImageFormat, reports: _Reports) -> None:
        """Decode in as many threads as there are CPUs; the caller's thread writes, in the order of ``paths``."""
        threads = num_cpus()
        with ThreadPoolExecutor(threads, thread_name_prefix="fishr-decode") as pool:
            tasks = (pool.submit(self._decode, path, format) for path in paths)
            for path, task in zip(paths, _looking_ahead(tasks, PENDING_PER_THREAD * threads), strict=True):
                try:
                    digest, pixels = task.result()
                except UnreadableImageError as error:
                    self.failures.append(f"{path} ({error})")
                    self.numbers.append(-1)
                else:
                    # Another file with the same content may have come in between.
                    if pixels is not None and digest not in self.known:
                        self._append(digest, pixels, file)
                    self.numbers.append(self.known[digest])
                reports.one_more()

    def _decode(self, path: Path, format: ImageFormat) -> tuple[bytes, NDArray[np.uint8] | None]:
        try:
            content = path.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise UnreadableImageError(getattr(error, "strerror", None) or str(error)) from error
        digest = hashlib.sha256(content).digest()
        return digest, None if digest in self.known else format.decode(content)

    def _append(self, digest: bytes, pixels: NDArray[np.uint8], file: BinaryIO) -> None:
        file.write(np.ascontiguousarray(pixels).data)
        self.known[digest] = self.first + len(self.images)
        self.images.append((digest, (0, self.num_bytes, pixels.shape[0], pixels.shape[1])))
        self.num_bytes += pixels.nbytes


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
