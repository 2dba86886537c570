"""Every test compares pixels with those of ``ImageFormat.decode``; ``decoded`` counts its calls."""

import errno
import hashlib
import io
import logging
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fishr.data import cache
from fishr.data.cache import StoredImages, cache_root, store_images
from fishr.data.image_format import ImageFormat
from fishr.errors import ConfigError, DataError

FORMAT = ImageFormat(8)  # stored with a shorter side of at most 12 pixels
DECODE = ImageFormat.decode

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def picture(seed: int) -> bytes:
    """A PNG file; wide, high and small ones."""
    shape = [(20, 14, 3), (9, 30, 3), (5, 5, 3), (40, 41, 3)][seed % 4]
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def make_pictures(folder: Path, count: int, start: int = 0) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index}.png" for index in range(start, start + count)]
    for index, path in enumerate(paths, start):
        path.write_bytes(picture(index))
    return paths


def edit(path: Path, content: bytes) -> None:
    """Write a file, with a modification time that differs however coarse the clock is."""
    before = path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(before + 10**9, before + 10**9))


def is_right(images: StoredImages, paths: Sequence[Path], format: ImageFormat = FORMAT) -> bool:
    right = [DECODE(format, path.read_bytes()) for path in paths]
    return len(images) == len(paths) and all(np.array_equal(images[i], right[i]) for i in range(len(paths)))


def hidden_files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob(".*")}


def is_clean(folder: Path) -> bool:
    """Nothing is left aside."""
    return hidden_files(folder) <= {".lock"}


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/parts/*"))


def records(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/lists/*/files"))


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Inodes of what is forced to disk from now on; it is not, which would be what these tests wait for most."""
    inodes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: inodes.append(os.fstat(descriptor).st_ino))
    return inodes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The content of each file that is decoded from now on."""
    contents: list[bytes] = []

    def decode(format: ImageFormat, content: bytes) -> np.ndarray:
        contents.append(content)
        return DECODE(format, content)

    monkeypatch.setattr(ImageFormat, "decode", decode)
    return contents


def fail_at(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, consequence: Callable[[], None]
) -> list[int]:
    """Let something happen at a function's call with this number, from 1; gives the number of calls.

    Of ``open`` only calls to write are counted.
    """
    real, calls = getattr(owner, name), [0]

    def fail(*args: Any, **kwargs: Any) -> Any:
        if name == "open" and args[1:] != ("wb",):
            return real(*args, **kwargs)
        calls[0] += 1
        if calls[0] == call:
            consequence()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, fail)
    return calls


def in_child(function: Callable[[], object]) -> int:
    """Start a process of its own that ends with code 0 if the function returns what is true; gives its id."""
    if child := os.fork():
        return child
    try:
        os._exit(0 if function() else 1)
    except BaseException:
        os._exit(2)


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# What is given


@pytest.mark.parametrize("mode", ["disk", "ram", "none"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_are_as_decoded(tmp_path: Path, folder: Path, mode: cache.CacheMode, channels: int) -> None:
    paths = make_pictures(tmp_path / "data", 9)
    format = ImageFormat(8, channels)
    for _ in range(2):
        images = store_images(paths, format, mode, folder)
        assert is_right(images, paths, format)
        assert np.array_equal(images[-1], images[8])
        with pytest.raises(IndexError):
            images[9]
        assert images[np.int64(3)].dtype == np.uint8
        assert images[3].flags.c_contiguous
        with pytest.raises(ValueError, match="read-only"):
            images[3][0, 0, 0] = 1


@pytest.mark.parametrize("mode", ["disk", "ram", "none"])
def test_no_images(folder: Path, mode: cache.CacheMode) -> None:
    for _ in range(2):
        assert len(store_images([], FORMAT, mode, folder)) == 0


@pytest.mark.parametrize("mode", ["disk", "ram"])
@pytest.mark.parametrize("cpus", [1, 2, 7])
def test_order_is_that_of_the_paths(
    tmp_path: Path, folder: Path, mode: cache.CacheMode, cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_pictures(tmp_path / "data", 60)
    contents = [path.read_bytes() for path in paths]

    def decode(format: ImageFormat, content: bytes) -> np.ndarray:
        time.sleep(0.002 * (contents.index(content) % 3))
        return DECODE(format, content)

    monkeypatch.setattr(ImageFormat, "decode", decode)
    monkeypatch.setattr(cache, "num_cpus", lambda: cpus)
    assert is_right(store_images(paths, FORMAT, mode, folder), paths)


@pytest.mark.parametrize("mode", ["disk", "ram", "none"])
def test_many_threads_may_read(tmp_path: Path, folder: Path, mode: cache.CacheMode) -> None:
    paths = make_pictures(tmp_path / "data", 8)
    images = store_images(paths, FORMAT, mode, folder)
    right = [DECODE(FORMAT, path.read_bytes()) for path in paths]
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda i: np.array_equal(images[i % 8], right[i % 8]), range(400)))


@pytest.mark.parametrize("mode", ["disk", "ram", "none"])
def test_images_can_be_read_after_a_fork(tmp_path: Path, folder: Path, mode: cache.CacheMode) -> None:
    paths = make_pictures(tmp_path / "data", 8)
    images = store_images(paths, FORMAT, mode, folder)
    children = [in_child(lambda: is_right(images, paths)) for _ in range(2)]
    assert [exit_code(child) for child in children] == [0, 0]
    assert is_right(images, paths)


def test_names_of_all_sorts(tmp_path: Path, folder: Path, decoded: list[bytes]) -> None:
    names = ["with space.png", "größe ∅.png", "new\nline.png", "per%cent {0}.png", os.fsdecode(b"not utf-8 \xff.png")]
    paths = [tmp_path / "da ta ü" / name for name in names]
    paths[0].parent.mkdir()
    for index, path in enumerate(paths):
        path.write_bytes(picture(index))
    folder = folder / "ca che ü"
    for _ in range(2):
        assert is_right(store_images(paths, FORMAT, "disk", folder), paths)
    assert len(decoded) == 5


def test_ram_and_none_leave_the_folder_alone(tmp_path: Path, folder: Path) -> None:
    paths = make_pictures(tmp_path / "data", 3)
    store_images(paths, FORMAT, "ram", folder)
    store_images(paths, FORMAT, "none", folder)
    assert not folder.exists()


def test_an_unknown_mode(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown cache 'disc'; did you mean 'disk'\? \(known: disk, none, ram\)"):
        store_images([], FORMAT, "disc", folder)  # type: ignore[arg-type]


def test_the_folder_is_the_variable_else_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("FISHR_CACHE", "~/named")
    assert cache_root() == tmp_path / "home" / "named"
    monkeypatch.setenv("FISHR_CACHE", "")
    assert cache_root() == tmp_path / "xdg" / "fishr" / "images"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == tmp_path / "home" / ".cache" / "fishr" / "images"
    monkeypatch.setenv("FISHR_CACHE", str(tmp_path / "named"))
    store_images(make_pictures(tmp_path / "data", 1), FORMAT, "disk")
    assert len(parts(tmp_path / "named")) == 1


# What is decoded and when


def test_none_decodes_at_each_access(tmp_path: Path, decoded: list[bytes]) -> None:
    paths = make_pictures(tmp_path / "data", 3)
    images = store_images(paths, FORMAT, "none")
    assert decoded == []
    assert np.array_equal(images[1], images[1])
    assert decoded == [picture(1)] * 2


@pytest.mark.parametrize("mode", ["disk", "ram"])
def test_each_image_is_decoded_once(tmp_path: Path, folder: Path, decoded: list[bytes], mode: cache.CacheMode) -> None:
    paths = make_pictures(tmp_path / "data", 50)
    images = store_images(paths, FORMAT, mode, folder)
    assert is_right(images, paths)
    assert is_right(images, paths)
    assert sorted(decoded) == sorted(map(picture, range(50)))


def test_a_warm_cache_reads_no_file_and_takes_no_lock(
    tmp_path: Path, folder: Path, decoded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_pictures(tmp_path / "data", 9)
    store_images(paths, FORMAT, "disk", folder)
    decoded.clear()
    read: list[Path] = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(path), real(path))[1])
    with monkeypatch.context() as locked:
        locked.setattr(cache, "_alone", lambda store: pytest.fail("a lock is taken"))
        images = store_images(paths, FORMAT, "disk", folder, lambda *_: pytest.fail("progress is reported"))
    assert read == records(folder)
    assert is_right(images, paths)
    assert decoded == []


def test_a_changed_file_alone_is_decoded_again(tmp_path: Path, folder: Path, decoded: list[bytes]) -> None:
    paths = make_pictures(tmp_path / "data", 9)
    before = store_images(paths, FORMAT, "disk", folder)
    old = [before[i].copy() for i in range(9)]
    decoded.clear()
    edit(paths[4], picture(100))
    for _ in range(2):
        assert is_right(store_images(paths, FORMAT, "disk", folder), paths)
    assert decoded == [picture(100)]
    assert all(np.array_equal(before[i], old[i]) for i in range(9))


def test_a_touched_file_is_read_once_and_not_decoded(
    tmp_path: Path, folder: Path, decoded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_pictures(tmp_path / "data", 9)
    store_images(paths, FORMAT, "disk", folder)
    decoded.clear()
    read: list[Path] = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(path), real(path))[1])
    edit(paths[4], paths[4].read_bytes())
    read.clear()
    for _ in range(2):
        images = store_images(paths, FORMAT, "disk", folder)
    assert [path for path in read if path.suffix == ".png"] == [paths[4]]
    assert is_right(images, paths)
    assert decoded == []
    assert len(parts(folder)) == 1


@pytest.mark.parametrize("how", [shutil.move, shutil.copytree])
def test_a_moved_or_copied_data_set_finds_its_images(
    tmp_path: Path, folder: Path, decoded: list[bytes], how: Callable[[Path, Path], object]
) -> None:
    paths = make_pictures(tmp_path / "data", 9)
    store_images(paths, FORMAT, "disk", folder)
    decoded.clear()
    how(tmp_path / "data", tmp_path / "elsewhere")
    moved = [tmp_path / "elsewhere" / path.name for path in paths]
    assert is_right(store_images(moved, FORMAT, "disk", folder), moved)
    assert decoded == []
    assert len(parts(folder)) == 1


def test_lists_share_images(tmp_path: Path, folder: Path, decoded: list[bytes]) -> None:
    """Part of a data set, another order, one file twice: nothing is decoded; of more files only those."""
    paths = make_pictures(tmp_path / "data", 9)
    store_images(paths, FORMAT, "disk", folder)
    decoded.clear()
    for some in (paths[3:5], paths[::-1], [paths[2], paths[7], paths[2]]):
        assert is_right(store_images(some, FORMAT, "disk", folder), some)
    assert decoded == []
    more = paths + make_pictures(tmp_path / "more", 2, start=9)
    for _ in range(2):
        assert is_right(store_images(more, FORMAT, "disk", folder), more)
    assert sorted(decoded) == sorted([picture(9), picture(10)])
    assert is_right(store_images(paths, FORMAT, "disk", folder), paths)


@pytest.mark.parametrize("mode", ["disk", "ram"])
def test_files_with_the_same_content_are_stored_once(tmp_path: Path, folder: Path, mode: cache.CacheMode) -> None:
    paths = make_pictures(tmp_path / "data", 6)
    for path in paths:
        path.write_bytes(picture(len(path.name) + 3 * (path.name > "3")))
    images = store_images(paths, FORMAT, mode, folder)
    assert is_right(images, paths)
    assert np.shares_memory(images[0], images[1])
    assert not np.shares_memory(images[0], images[5])


def test_sizes_and_channels_are_kept_apart(tmp_path: Path, folder: Path, decoded: list[bytes]) -> None:
    paths = make_pictures(tmp_path / "data", 9)
    formats = [ImageFormat(8), ImageFormat(16), ImageFormat(8, 1)]
    for _ in range(2):
        for format in formats:
            assert is_right(store_images(paths, format, "disk", folder), paths, format)
    assert len(decoded) == 27


def test_relative_paths_are_those_of_the_working_folder(
    tmp_path: Path, folder: Path, decoded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, start in (("a", 0), ("b", 2)):
        make_pictures(tmp_path / name, 2, start)
    for name in "ab":
        for path in (tmp_path / name).iterdir():
            path.rename(path.with_name(f"{int(path.stem) % 2}.png"))
    relative = [Path("0.png"), Path("1.png")]
    for name in "aba":
        monkeypatch.chdir(tmp_path / name)
        assert is_right(store_images(relative, FORMAT, "disk", folder), relative)
    absolute = [tmp_path / "a" / path for path in relative]
    store_images(absolute, FORMAT, "disk", folder)
    assert len(decoded) == 4
    assert len(records(folder)) == 2


def test_an_edit_that_keeps_size_and_time_is_not_noticed(tmp_path: Path, folder: Path) -> None:
    """The price of not reading every file at every start, as documented."""
    (path,) = make_pictures(tmp_path / "data", 1)
    old = DECODE(FORMAT, path.read_bytes())
    store_images([path], FORMAT, "disk", folder)
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert np.array_equal(store_images([path], FORMAT, "disk", folder)[0], old)
    path.write_bytes(content + b"longer")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert is_right(store_images([path], FORMAT, "disk", folder), [path])


def test_a_file_that_changes_while_it_is_read_is_read_again_next_time(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes and times are those from before reading; taken afterwards, they would be of content nobody has read."""
    paths = make_pictures(tmp_path / "data", 2)
    with monkeypatch.context() as patched:
        fail_at(patched, ImageFormat, "decode", 2, lambda: edit(paths[0], picture(50)))
        store_images(paths, FORMAT, "disk", folder)
    assert is_right(store_images(paths, FORMAT, "disk", folder), paths)


# What is removed


def test_images_that_nothing_refers_to_are_removed(tmp_path: Path, folder: Path) -> None:
    paths = make_pictures(tmp_path / "data", 3)
    store_images(paths, FORMAT, "disk", folder)
    (old,) = parts(folder)
    for index, path in enumerate(paths[:2]):
        edit(path, picture(100 + index))
    store_images(paths, FORMAT, "disk", folder)
    assert old in parts(folder), "an image in it is still used"
    assert len(parts(folder)) == 2
    edit(paths[2], picture(102))
    images = store_images(paths, FORMAT, "disk", folder)
    assert old not in parts(folder)
    assert is_right(images, paths)


def test_images_that_another_list_refers_to_stay(tmp_path: Path, folder: Path, decoded: list[bytes]) -> None:
    ours = make_pictures(tmp_path / "ours", 3)
    theirs = make_pictures(tmp_path / "theirs", 3)
    for paths in (ours, theirs):
        store_images(paths, FORMAT, "disk", folder)
    for index, path in enumerate(ours):
        edit(path, picture(100 + index))
    store_images(ours, FORMAT, "disk", folder)
    decoded.clear()
    assert is_right(store_images(theirs, FORMAT, "disk", folder), theirs)
    assert decoded == []


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path, folder: Path) -> None:
    paths = make_pictures(tmp_path / "data", 3)
    store_images(paths[:1], FORMAT, "disk", folder)
    (store,) = folder.iterdir()
    (store / ".pixels").write_bytes(b"x" * 1000)
    for left in (store / "parts" / ".0123.99", store / "lists" / ".0123.old.99"):
        left.mkdir()
        (left / "file").touch()
    assert not is_clean(folder)
    assert is_right(store_images(paths, FORMAT, "disk", folder), paths)
    assert is_clean(folder)
    assert sum((part / "pixels").stat().st_size for part in parts(folder)) == sum(
        DECODE(FORMAT, path.read_bytes()).nbytes for path in paths
    )


# Progress


@pytest.mark.parametrize("mode", ["disk", "ram"])
def test_progress_rises_to_all(tmp_path: Path, folder: Path, mode: cache.CacheMode) -> None:
    paths = make_pictures(tmp_path / "data", 40)
    calls: list[tuple[int, int]] = []
    threads = set()

    def progress(done: int, total: int) -> None:
        calls.append((done, total))
        threads.add(threading.current_thread())

    store_images(paths, FORMAT, mode, folder, progress)
    assert calls == sorted(set(calls))
    assert {total for _, total in calls} == {40}
    assert calls[-1] == (40, 40)
    assert threads == {threading.current_thread()}


def test_progress_is_reported_20_times_a_second(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = make_pictures(tmp_path / "data", 100)
    clock = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock) / 100)  # a hundredth of a second for each image
    calls: list[int] = []
    store_images(paths, FORMAT, "ram", folder, lambda done, _: calls.append(done))
    assert 15 <= len(calls) <= 21
    assert calls[-1] == 100


def test_progress_counts_what_is_there_already(tmp_path: Path, folder: Path) -> None:
    paths = make_pictures(tmp_path / "data", 9)
    store_images(paths, FORMAT, "disk", folder)
    edit(paths[0], picture(100))
    calls: list[tuple[int, int]] = []
    store_images(paths, FORMAT, "disk", folder, lambda *call: calls.append(call))
    assert calls == [(9, 9)]


@pytest.mark.parametrize("mode", ["disk", "ram"])
def test_few_images_wait_in_memory(
    tmp_path: Path, folder: Path, mode: cache.CacheMode, monkeypatch: pytest.MonkeyPatch, decoded: list[bytes]
) -> None:
    paths = make_pictures(tmp_path / "data", 120)
    monkeypatch.setattr(cache, "num_cpus", lambda: 2)
    monkeypatch.setattr(cache, "SECONDS_BETWEEN_REPORTS", 0)
    waiting = []

    def progress(done: int, _: int) -> None:
        time.sleep(0.005)  # a slow disk: the threads are done with all they may do
        waiting.append(len(decoded) - done)

    store_images(paths, FORMAT, mode, folder, progress)
    assert 24 <= max(waiting) <= 40  # two tasks of 8 images for each thread, and the one that is being stored


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_build_keeps_what_was_decoded(
    tmp_path: Path,
    folder: Path,
    decoded: list[bytes],
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
    warnings_logged: Callable[[], list[str]],
) -> None:
    paths = make_pictures(tmp_path / "data", 120)
    monkeypatch.setattr(cache, "num_cpus", lambda: 2)
    monkeypatch.setattr(cache, "SECONDS_BETWEEN_REPORTS", 0)

    def progress(done: int, _: int) -> None:
        if done == 7:
            raise error

    with pytest.raises(error):
        store_images(paths, FORMAT, "disk", folder, progress)
    assert len(decoded) < 120, "what was not begun is not decoded any more"
    assert is_clean(folder)
    assert len(parts(folder)) == 1
    assert records(folder) == []
    decoded.clear()
    assert is_right(store_images(paths, FORMAT, "disk", folder), paths)
    assert len(decoded) == 113
    assert warnings_logged() == []


def test_an_interrupt_while_an_image_is_written(
    tmp_path: Path,
    folder: Path,
    decoded: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    warnings_logged: Callable[[], list[str]],
) -> None:
    paths = make_pictures(tmp_path / "data", 9)
    real = cache._Part.append

    def append(part: cache._Part, digest: bytes, pixels: np.ndarray) -> None:
        if len(part.images) == 4:
            part.file.write(b"half an image")
            raise KeyboardInterrupt
        real(part, digest, pixels)

    with monkeypatch.context() as patched:
        patched.setattr(cache._Part, "append", append)
        with pytest.raises(KeyboardInterrupt):
            store_images(paths, FORMAT, "disk", folder)
    assert is_clean(folder)
    decoded.clear()
    assert is_right(store_images(paths, FORMAT, "disk", folder), paths)
    assert len(decoded) == 5
    assert warnings_logged() == []


def test_an_interrupt_that_cannot_be_made_good(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = make_pictures(tmp_path / "data", 9)

    def progress(done: int, _: int) -> None:
        raise KeyboardInterrupt

    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        fail_at(patched, Path, "rename", 1, fail)
        with pytest.raises(KeyboardInterrupt):
            store_images(paths, FORMAT, "disk", folder, progress)
    assert is_clean(folder)
    assert parts(folder) == []
    assert is_right(store_images(paths, FORMAT, "disk", folder), paths)


@pytest.mark.parametrize(("limit", "value"), [("PART_IMAGES", 4), ("PART_BYTES", 1500)])
def test_a_large_part_is_finished_at_once(
    tmp_path: Path, folder: Path, decoded: list[bytes], limit: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_pictures(tmp_path / "data", 30)
    monkeypatch.setattr(cache, limit, value)
    monkeypatch.setattr(cache, "SECONDS_BETWEEN_REPORTS", 0)

    def progress(done: int, _: int) -> None:
        if done == 22:
            os.kill(os.getpid(), signal.SIGKILL)

    assert exit_code(in_child(lambda: store_images(paths, FORMAT, "disk", folder, progress))) == -signal.SIGKILL
    assert len(parts(folder)) >= 4
    assert is_right(store_images(paths, FORMAT, "disk", folder), paths)
    assert len(decoded) <= 12, "a killed process loses a part at most"
    assert len(parts(folder)) >= 7
    assert is_right(store_images(paths, FORMAT, "disk", folder), paths)
    assert len(decoded) <= 12
    assert is_clean(folder)


def test_parts_grow_with_the_cache(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PART_IMAGES", 2)
    monkeypatch.setattr(cache, "LARGEST_SHARE", 1.0)
    paths = make_pictures(tmp_path / "data", 32)
    assert is_right(store_images(paths, FORMAT, "disk", folder), paths)
    assert len(parts(folder)) == 5  # 2, 2, 4, 8 and 16 images


def test_everything_is_forced_to_disk(tmp_path: Path, folder: Path, forced: list[int]) -> None:
    store_images(make_pictures(tmp_path / "data", 3), FORMAT, "disk", folder)
    (part,) = parts(folder)
    (record,) = records(folder)
    written = [part / "pixels", part / "index", part.parent, record, record.parent.parent]
    assert {path.stat().st_ino for path in written} <= set(forced)


# Several at once


def test_two_processes_at_once_decode_each_image_once(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_pictures(tmp_path / "data", 20)
    log = tmp_path / "log"
    started, start = os.pipe()

    def decode(format: ImageFormat, content: bytes) -> np.ndarray:
        time.sleep(0.01)
        with log.open("a") as file:
            file.write(hashlib.sha256(content).hexdigest() + "\n")
        return DECODE(format, content)

    def build() -> bool:
        os.read(started, 1)
        images = store_images(paths, FORMAT, "disk", folder)
        monkeypatch.undo()
        return is_right(images, paths)

    monkeypatch.setattr(ImageFormat, "decode", decode)
    children = [in_child(build) for _ in range(3)]
    os.write(start, b"123")
    assert [exit_code(child) for child in children] == [0, 0, 0]
    lines = log.read_text().split()
    assert sorted(lines) == sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)


def test_threads_at_once_decode_each_image_once(
    tmp_path: Path,
    folder: Path,
    decoded: list[bytes],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("fishr"), "propagate", True)
    caplog.set_level(logging.INFO)
    paths = make_pictures(tmp_path / "data", 40)
    both = threading.Barrier(2)
    fills = fail_at(monkeypatch, cache, "_fill", 0, lambda: None)

    def build(_: int) -> bool:
        both.wait()
        return is_right(store_images(paths, FORMAT, "disk", folder), paths)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(build, range(2)))
    assert len(decoded) == 40
    assert fills == [1], "who comes second writes nothing"
    assert "waiting for another process that fills the image cache" in caplog.text


def test_different_data_sets_may_be_stored_at_once(tmp_path: Path, folder: Path) -> None:
    sets = [make_pictures(tmp_path / f"{start}", 10, start) for start in (0, 5, 10)]
    children = [
        in_child(lambda paths=paths: is_right(store_images(paths, FORMAT, "disk", folder), paths)) for paths in sets
    ]
    assert [exit_code(child) for child in children] == [0, 0, 0]
    for paths in sets:
        assert is_right(store_images(paths, FORMAT, "disk", folder), paths)
    assert is_clean(folder)


KILLED_AT = [
    *((ImageFormat, "decode", call) for call in (1, 5, 10)),
    *((os, "fsync", call) for call in (1, 2, 3, 4, 5)),
    *((Path, "rename", call) for call in (1, 2, 3)),
]
"""Functions, and which of their calls a build is stopped at; there are no more than these calls."""


@pytest.mark.parametrize(("owner", "name", "call"), KILLED_AT)
def test_a_killed_build_is_made_up_for(
    tmp_path: Path,
    folder: Path,
    owner: Any,
    name: str,
    call: int,
    monkeypatch: pytest.MonkeyPatch,
    warnings_logged: Callable[[], list[str]],
) -> None:
    paths = make_pictures(tmp_path / "data", 10)
    with monkeypatch.context() as patched:
        fail_at(patched, owner, name, call, lambda: os.kill(os.getpid(), signal.SIGKILL))
        child = in_child(lambda: store_images(paths, FORMAT, "disk", folder))
    assert exit_code(child) == -signal.SIGKILL
    assert is_right(store_images(paths, FORMAT, "disk", folder), paths)
    assert is_clean(folder)
    assert len(parts(folder)) == 1
    assert warnings_logged() == []


def test_what_a_killed_process_had_finished_is_not_decoded_again(
    tmp_path: Path, folder: Path, decoded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_pictures(tmp_path / "data", 10)
    with monkeypatch.context() as patched:
        fail_at(patched, Path, "rename", 3, lambda: os.kill(os.getpid(), signal.SIGKILL))
        exit_code(in_child(lambda: store_images(paths, FORMAT, "disk", folder)))
    assert is_right(store_images(paths, FORMAT, "disk", folder), paths)
    assert decoded == []


# Images that cannot be read


@pytest.mark.parametrize("mode", ["disk", "ram"])
def test_unreadable_images_are_named(tmp_path: Path, folder: Path, mode: cache.CacheMode, decoded: list[bytes]) -> None:
    paths = make_pictures(tmp_path / "data", 30)
    paths[3].write_bytes(b"")
    paths[17].write_bytes(b"no picture at all")
    paths[29].unlink()
    calls: list[tuple[int, int]] = []
    with pytest.raises(DataError) as caught:
        store_images(paths, FORMAT, mode, folder, lambda *call: calls.append(call))
    reasons = r"\(the file is empty\), .*17\.png \(not an image.*\), .*29\.png \(No such file or directory\)"
    message = str(caught.value)
    assert re.fullmatch(rf"3 of 30 images cannot be read: .*3\.png {reasons}: repair or remove them", message)
    assert str(paths[3]) in message
    assert "\n" not in message
    assert calls[-1] == (30, 30), "all are tried"
    for index in (3, 17, 29):
        paths[index].write_bytes(picture(index))
    decoded.clear()
    assert is_right(store_images(paths, FORMAT, mode, folder), paths)
    if mode == "disk":
        assert len(decoded) == 3, "what could be read is not lost"


def test_what_waits_for_a_repair_is_kept(tmp_path: Path, folder: Path, decoded: list[bytes]) -> None:
    ours, theirs = make_pictures(tmp_path / "ours", 5), make_pictures(tmp_path / "theirs", 5, start=5)
    ours[0].write_bytes(b"")
    with pytest.raises(DataError, match="1 of 5 images cannot be read"):
        store_images(ours, FORMAT, "disk", folder)
    store_images(theirs, FORMAT, "disk", folder)
    decoded.clear()
    assert is_right(store_images(ours[1:], FORMAT, "disk", folder), ours[1:])
    assert decoded == []


@pytest.mark.parametrize("mode", ["disk", "ram"])
def test_at_most_three_are_named(tmp_path: Path, folder: Path, mode: cache.CacheMode) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(8)]
    with pytest.raises(DataError, match=r"^8 of 8 images cannot be read: [^,]+0\.png [^,]+, [^,]+, [^,]+ and 5 more: "):
        store_images(paths, FORMAT, mode, folder)


def test_an_unreadable_image_comes_to_light_when_it_is_asked_for(tmp_path: Path) -> None:
    paths = make_pictures(tmp_path / "data", 2)
    paths[1].write_bytes(paths[1].read_bytes()[:60])
    images = store_images(paths, FORMAT, "none")
    assert images[0].shape == (17, 12, 3)
    with pytest.raises(DataError, match=rf"^{re.escape(str(paths[1]))} cannot be read \(.+\): repair or remove it$"):
        images[1]


@pytest.mark.parametrize("mode", ["disk", "ram"])
def test_folders_and_impossible_names_are_unreadable(tmp_path: Path, folder: Path, mode: cache.CacheMode) -> None:
    paths = [tmp_path, tmp_path / "null\0byte.png", tmp_path / "\ud800.png"]
    with pytest.raises(DataError, match=r"3 of 3 images cannot be read: .*\(Is a directory\).*null byte.*surrogates"):
        store_images(paths, FORMAT, mode, folder)


def test_files_that_vanished_are_noticed(tmp_path: Path, folder: Path) -> None:
    paths = make_pictures(tmp_path / "data", 3)
    store_images(paths, FORMAT, "disk", folder)
    content = paths[1].read_bytes()
    stat = paths[1].stat()
    paths[1].unlink()
    for _ in range(2):
        with pytest.raises(DataError, match="1 of 3 images cannot be read"):
            store_images(paths, FORMAT, "disk", folder)
    paths[1].write_bytes(content)
    os.utime(paths[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert is_right(store_images(paths, FORMAT, "disk", folder), paths)


# Folders that cannot be used


INSTEAD = r"name another folder by \$FISHR_CACHE, or use --cache ram or --cache none$"

WRITING = [
    *((Path, "mkdir", call) for call in (1, 3, 5, 7, 8, 10)),
    *((Path, "open", call) for call in (1, 2, 3)),
    *((os, "fsync", call) for call in (1, 2, 3, 4, 5)),
    *((Path, "rename", call) for call in (1, 2, 3)),
]
"""Functions, and which of their calls fail; there are no more than these in a build."""


@pytest.mark.parametrize(("owner", "name", "call"), WRITING)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_failure_to_write(
    tmp_path: Path, folder: Path, owner: Any, name: str, call: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_pictures(tmp_path / "data", 10)

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        fail_at(patched, owner, name, call, fail)
        if code == errno.ENOSPC:
            message = (
                rf"^there is no space for the images in {folder}( \(they take about 1 MB\))?: free some, {INSTEAD}"
            )
        else:
            reason = os.strerror(code)
            message = rf"^the image cache {folder} cannot be used \({reason}\): make it a writable folder, {INSTEAD}"
        with pytest.raises(DataError, match=message):
            store_images(paths, FORMAT, "disk", folder)
    if folder.exists():
        assert is_clean(folder)
    for _ in range(2):
        assert is_right(store_images(paths, FORMAT, "disk", folder), paths)
    assert is_clean(folder)
    assert len(parts(folder)) == len(records(folder)) == 1


def test_the_failures_are_all_there_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = make_pictures(tmp_path / "data", 10)
    for owner, name in {(owner, name) for owner, name, _ in KILLED_AT + WRITING}:
        last = max(call for o, n, call in KILLED_AT + WRITING if (o, n) == (owner, name))
        with monkeypatch.context() as patched:
            calls = fail_at(patched, owner, name, 0, lambda: None)
            store_images(paths, FORMAT, "disk", tmp_path / name)
        assert calls[0] <= last, name


def test_a_disk_that_is_full_half_way(
    tmp_path: Path, folder: Path, decoded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk(io.FileIO):
        def write(self, content: Any) -> int:
            if self.tell() > 10_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(content)

    paths = make_pictures(tmp_path / "data", 100)
    store_images(paths[:1], FORMAT, "disk", folder)
    real = Path.open
    with monkeypatch.context() as patched:
        patched.setattr(
            Path, "open", lambda path, mode: FullDisk(path, mode) if path.name == ".pixels" else real(path, mode)
        )
        with pytest.raises(
            DataError, match=rf"^there is no space for the images in {folder} \(they take about 1 MB\): "
        ):
            store_images(paths, FORMAT, "disk", folder)
    assert is_clean(folder)
    assert len(parts(folder)) == 1
    assert is_right(store_images(paths[:1], FORMAT, "disk", folder), paths[:1])
    assert is_right(store_images(paths, FORMAT, "disk", folder), paths)


def test_the_space_that_is_needed_is_judged_by_what_was_decoded() -> None:
    decoding = cache._Decoding({}, 0, numbers=[0, 1, -1, 2], num_bytes=30_000_000)
    assert cache._needed(decoding, 600) == " (they take about 4,500 MB)"


@pytest.mark.parametrize("place", ["", "v1-12x3", "v1-12x3/parts", "v1-12x3/lists"])
def test_a_file_in_the_folders_place(tmp_path: Path, folder: Path, place: str) -> None:
    paths = make_pictures(tmp_path / "data", 3)
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    (folder / place).touch()
    with pytest.raises(
        DataError, match=rf"^the image cache {folder} cannot be used \(.+\): make it a writable folder, {INSTEAD}"
    ):
        store_images(paths, FORMAT, "disk", folder)
    (folder / place).unlink()
    assert is_right(store_images(paths, FORMAT, "disk", folder), paths)


def test_a_folder_that_cannot_be_locked(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[bytes]
) -> None:
    paths = make_pictures(tmp_path / "data", 3)
    real = os.open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith(".lock"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        with pytest.raises(DataError, match=rf"{folder} cannot be used \(Permission denied\)"):
            store_images(paths, FORMAT, "disk", folder)
    assert decoded == []


def test_images_that_do_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class SmallMemory(io.BytesIO):
        def write(self, content: Any) -> int:
            if self.tell() + len(content) > 50:
                raise MemoryError
            return super().write(content)

    monkeypatch.setattr(io, "BytesIO", SmallMemory)
    monkeypatch.setattr(ImageFormat, "decode", lambda format, content: np.zeros((4, 4, 3), np.uint8) + len(content) % 7)
    paths = []
    for index in range(3):
        paths.append(tmp_path / f"{index}.png")
        paths[-1].write_bytes(b"x" * index)
    with pytest.raises(
        DataError,
        match=r"^the images do not fit into memory \(they take about 1 MB\): use --cache disk or --cache none$",
    ):
        store_images(paths, FORMAT, "ram")


# Damage


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, empty, lengthen, Path.unlink])
def test_damaged_pixels_are_decoded_again(
    tmp_path: Path,
    folder: Path,
    decoded: list[bytes],
    damage: Callable[[Path], None],
    warnings_logged: Callable[[], list[str]],
) -> None:
    paths = make_pictures(tmp_path / "data", 10)
    store_images(paths[:4], FORMAT, "disk", folder)
    (part,) = parts(folder)
    store_images(paths, FORMAT, "disk", folder)
    decoded.clear()
    damage(part / "pixels")
    assert is_right(store_images(paths, FORMAT, "disk", folder), paths)
    assert warnings_logged() == [f"{part} is damaged; the images in it are decoded again"]
    assert len(decoded) == 4
    # The other list referred to the same images.
    assert is_right(store_images(paths[:4], FORMAT, "disk", folder), paths[:4])
    assert len(decoded) == 4
    assert len(warnings_logged()) == 1


@pytest.mark.parametrize("damage", [cut, empty, lengthen, flip, Path.unlink])
def test_a_damaged_index_is_noticed_when_it_is_needed(
    tmp_path: Path,
    folder: Path,
    decoded: list[bytes],
    damage: Callable[[Path], None],
    warnings_logged: Callable[[], list[str]],
) -> None:
    paths = make_pictures(tmp_path / "data", 4)
    store_images(paths, FORMAT, "disk", folder)
    (part,) = parts(folder)
    damage(part / "index")
    assert is_right(store_images(paths, FORMAT, "disk", folder), paths)
    decoded.clear()
    assert is_right(store_images(paths[:3], FORMAT, "disk", folder), paths[:3])
    assert warnings_logged() == [f"{part} is damaged; the images in it are decoded again"]
    assert len(decoded) == 3


@pytest.mark.parametrize("damage", [cut, empty, lengthen, flip, Path.unlink])
def test_a_damaged_record_is_made_again_without_decoding(
    tmp_path: Path,
    folder: Path,
    decoded: list[bytes],
    damage: Callable[[Path], None],
    warnings_logged: Callable[[], list[str]],
) -> None:
    paths = make_pictures(tmp_path / "data", 4)
    store_images(paths, FORMAT, "disk", folder)
    decoded.clear()
    (record,) = records(folder)
    damage(record)
    for _ in range(2):
        assert is_right(store_images(paths, FORMAT, "disk", folder), paths)
    assert warnings_logged() == [f"{record.parent} is damaged; the files it lists are read again"]
    assert decoded == []


def test_a_cache_that_was_deleted_is_made_again(
    tmp_path: Path, folder: Path, decoded: list[bytes], warnings_logged: Callable[[], list[str]]
) -> None:
    paths = make_pictures(tmp_path / "data", 4)
    images = store_images(paths, FORMAT, "disk", folder)
    for gone in (folder, parts(folder)[0].parent, records(folder)[0].parent.parent):
        shutil.rmtree(gone, ignore_errors=True)
        assert is_right(store_images(paths, FORMAT, "disk", folder), paths)
    assert is_right(images, paths), "what was opened before stays readable"
    assert warnings_logged() == []


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path, folder: Path) -> None:
    paths = make_pictures(tmp_path / "data", 4)
    store_images(paths, FORMAT, "disk", folder)
    for place in ("v1-12x3", "v1-12x3/parts", "v1-12x3/lists"):
        (folder / place / ".DS_Store").write_bytes(b"a viewer's notes")
    for index, path in enumerate(paths):
        edit(path, picture(100 + index))
    assert is_right(store_images(paths, FORMAT, "disk", folder), paths)
    assert len(list(folder.rglob(".DS_Store"))) == 3


def test_a_copied_part_does_no_harm(tmp_path: Path, folder: Path, decoded: list[bytes]) -> None:
    """Its images are there twice; those that are decoded next must not be mistaken for them."""
    paths = make_pictures(tmp_path / "data", 8)
    store_images(paths[:5], FORMAT, "disk", folder)
    (part,) = parts(folder)
    shutil.copytree(part, part.with_name("0copy"))
    assert is_right(store_images(paths, FORMAT, "disk", folder), paths)
    assert len(decoded) == 8


def test_a_cache_that_others_empty_meanwhile(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = make_pictures(tmp_path / "data", 4)
    real = cache._fill

    def fill_in_vain(store: Path, *args: Any) -> None:
        real(store, *args)
        shutil.rmtree(store / "parts")

    monkeypatch.setattr(cache, "_fill", fill_in_vain)
    with pytest.raises(DataError, match=rf"image cache {folder} was changed while it was filled: run again, or use"):
        store_images(paths, FORMAT, "disk", folder)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_pixels_are_right(
    tmp_path: Path, folder: Path, seed: int, decoded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random edits, moves, damage and failures; only what is not stored is decoded, unless something was damaged."""
    random = np.random.default_rng(seed)
    paths = make_pictures(tmp_path / "data", 8)
    harmed = False
    for step in range(30):
        decoded.clear()
        stored = set() if harmed else {digest for part in parts(folder) for digest in digests(part)}
        some = [paths[index] for index in random.permutation(8)[: random.integers(1, 9)]] if step % 2 else paths
        with monkeypatch.context() as patched:
            if random.random() < 0.2:
                owner, name, call = WRITING[random.integers(len(WRITING))]
                fail_at(patched, owner, name, call, refuse)
            with suppress(DataError):
                assert is_right(store_images(some, FORMAT, "disk", folder), some)
        assert is_right(store_images(some, FORMAT, "disk", folder), some)
        # What a list's new record took the place of stays till the next build if the disk fails just then.
        assert all(name == ".lock" or ".old." in name for name in hidden_files(folder))
        assert {hashlib.sha256(content).digest() for content in decoded}.isdisjoint(stored)
        harmed = False
        match random.integers(5):
            case 0:
                edit(paths[random.integers(8)], picture(int(random.integers(20))))
            case 1:
                edit(paths[0], paths[0].read_bytes())
            case 2:
                moved = tmp_path / f"moved {step}"
                shutil.move(paths[0].parent, moved)
                paths = [moved / path.name for path in paths]
            case 3:
                files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 3]
                # Their folders' names differ from run to run.
                files.sort(key=lambda path: (path.name, path.stat().st_mtime_ns))
                if files:
                    harm = [cut, empty, lengthen, flip, Path.unlink][random.integers(5)]
                    harmed_file = files[random.integers(len(files))]
                    if (harmed_file.name, harm) != ("pixels", flip):  # not noticed
                        harm(harmed_file)
                        harmed = True
    edit(paths[0], picture(100))
    assert is_right(store_images(paths, FORMAT, "disk", folder), paths)
    assert is_clean(folder)


def refuse() -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


def digests(part: Path) -> list[bytes]:
    arrays = cache._read_arrays(part / "index")
    return [] if arrays is None else arrays[0]["digest"].tolist()
