"""Downloads over connections that break and from servers that lie."""

import hashlib
import multiprocessing
import resource
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fishr.data import fetch
from fishr.data.fetch import RETRIES, fetch_file
from fishr.errors import DataError
from loopback import Fault, Loopback, loopback

CONTENT = np.random.default_rng(0).bytes(1_000_000)
OTHER = np.random.default_rng(1).bytes(900_000)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetch, "FIRST_PAUSE_SECONDS", 0.0)
    with loopback() as server:
        server.files["/images.zip"] = CONTENT
        yield server


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "images.zip"


def fetched(server: Loopback, path: Path, **options: object) -> bytes:
    fetch_file(server.url("/images.zip"), path, **options)  # type: ignore[arg-type]
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    return path.read_bytes()


def test_a_file_arrives_whole(server: Loopback, path: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    assert fetched(server, path, on_bytes=lambda *what: told.append(what)) == CONTENT
    assert told[0] == ("images.zip", 0, len(CONTENT))
    assert told[-1] == ("images.zip", len(CONTENT), len(CONTENT))
    assert server.ranges == [None]


def test_what_is_there_is_not_asked_for(server: Loopback, path: Path) -> None:
    path.write_bytes(b"there")
    assert fetched(server, path) == b"there"
    assert server.ranges == []


def test_broken_connections_are_continued(server: Loopback, path: Path) -> None:
    server.faults += [Fault(cut=300_000), Fault(cut=200_000), Fault(cut=100_000)]
    assert fetched(server, path) == CONTENT
    assert server.ranges == [None, "bytes=300000-", "bytes=500000-", "bytes=600000-"]


def test_progress_resets_the_count_of_failures(server: Loopback, path: Path) -> None:
    server.faults += [Fault(cut=50_000)] * (3 * RETRIES)
    assert fetched(server, path) == CONTENT


def test_no_progress_is_given_up_and_continued_by_the_next_call(server: Loopback, path: Path) -> None:
    server.faults += [Fault(cut=300_000), *[Fault(cut=0)] * RETRIES]
    message = (
        rf"failed {RETRIES + 1} times in a row \(broke off after 300,000 of 1,000,000 bytes\); 300,000 bytes "
        rf"are there and stay in {path.parent}: call again later, it continues$"
    )
    with pytest.raises(DataError, match=message):
        fetched(server, path)
    assert not path.exists()
    assert fetched(server, path) == CONTENT
    assert server.ranges[-1] == "bytes=300000-"


def test_servers_without_ranges_send_it_anew(server: Loopback, path: Path) -> None:
    server.faults += [Fault(cut=300_000), Fault(cut=200_000, whole=True), Fault(whole=True)]
    assert fetched(server, path) == CONTENT


@pytest.mark.parametrize("headers", [{"ETag": '"second"'}, {"Last-Modified": "Tue, 02 Jan 2024 00:00:00 GMT"}])
def test_another_version_is_never_mixed_in(server: Loopback, path: Path, headers: dict[str, str]) -> None:
    server.faults += [Fault(cut=300_000), *[Fault(status=503)] * RETRIES]
    with pytest.raises(DataError, match="says 503 Service Unavailable"):
        fetched(server, path)
    server.files["/images.zip"], server.headers = OTHER, headers
    assert fetched(server, path) == OTHER
    assert server.ranges[-1] == "bytes=300000-"


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"weak"'}], ids=["none", "weak"])
def test_parts_of_no_certain_version_are_not_continued(server: Loopback, path: Path, headers: dict[str, str]) -> None:
    server.headers = headers
    server.faults += [Fault(cut=300_000)]
    assert fetched(server, path) == CONTENT
    assert server.ranges == [None, None]


def test_the_time_of_change_is_a_version(server: Loopback, path: Path) -> None:
    server.headers = {"ETag": 'W/"weak"', "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
    server.faults += [Fault(cut=300_000)]
    assert fetched(server, path) == CONTENT
    assert server.ranges == [None, "bytes=300000-"]


def test_another_part_than_asked_for_is_not_taken(server: Loopback, path: Path) -> None:
    server.faults += [Fault(cut=300_000), Fault(start=200_000)]
    assert fetched(server, path) == CONTENT
    assert server.ranges == [None, "bytes=300000-", None]


class TestLiesAboutSizes:
    def test_more_is_declared_than_there_is(self, server: Loopback, path: Path) -> None:
        server.faults += [Fault(length=len(CONTENT) + 10)]
        assert fetched(server, path) == CONTENT
        assert server.ranges == [None, f"bytes={len(CONTENT)}-"]

    def test_more_is_always_declared(self, server: Loopback, path: Path) -> None:
        server.faults += [Fault(length=len(CONTENT) + 10, whole=True)] * (RETRIES + 1)
        with pytest.raises(DataError, match=r"\(broke off after 1,000,000 of 1,000,010 bytes\)"):
            fetched(server, path)
        assert not path.exists()

    def test_less_is_declared(self, server: Loopback, path: Path) -> None:
        server.faults += [Fault(length=600_000)]
        with pytest.raises(
            DataError, match=r"images\.zip has 600,000 bytes, expected 1,000,000: the source is damaged"
        ):
            fetched(server, path, size=len(CONTENT))
        assert not list(path.parent.iterdir())

    def test_nothing_is_declared(self, server: Loopback, path: Path) -> None:
        server.faults += [Fault(length=-1)]
        assert fetched(server, path) == CONTENT

    def test_nothing_is_declared_and_the_connection_breaks(self, server: Loopback, path: Path) -> None:
        server.faults += [Fault(length=-1, cut=400_000)]
        assert fetched(server, path, size=len(CONTENT)) == CONTENT
        assert server.ranges == [None, "bytes=400000-"]

    def test_more_is_sent_than_expected(self, server: Loopback, path: Path) -> None:
        server.faults += [Fault(length=-1)]
        with pytest.raises(DataError, match="sent 1,000,000 bytes, expected 999,999: call again, it starts anew"):
            fetched(server, path, size=len(CONTENT) - 1)
        assert not list(path.parent.iterdir())


def test_content_is_checked(server: Loopback, path: Path) -> None:
    expected = hashlib.sha256(OTHER).hexdigest()
    with pytest.raises(DataError, match=rf"sent content with SHA-256 [0-9a-f]{{64}}, expected {expected}"):
        fetched(server, path, sha256=expected)
    assert not list(path.parent.iterdir())
    assert fetched(server, path, sha256=hashlib.sha256(CONTENT).hexdigest()) == CONTENT


def test_what_the_server_does_not_have_is_asked_for_once(server: Loopback, path: Path) -> None:
    del server.files["/images.zip"]
    with pytest.raises(DataError, match=r"images\.zip says 404 Not Found: expected the file; it may have moved"):
        fetched(server, path)
    assert len(server.ranges) == 1


def test_busy_servers_are_asked_again(server: Loopback, path: Path) -> None:
    server.faults += [Fault(status=503), Fault(status=429), Fault(status=500)]
    assert fetched(server, path) == CONTENT


def test_pauses_grow_and_are_bounded(server: Loopback, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(fetch, "FIRST_PAUSE_SECONDS", 2.0)
    monkeypatch.setattr(time, "sleep", pauses.append)
    server.faults += [Fault(status=503)] * (RETRIES + 1)
    with pytest.raises(DataError, match="failed 7 times"):
        fetched(server, path)
    assert pauses == [2, 4, 8, 16, 30, 30]


def test_no_way_there_is_said_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with loopback() as server:
        address = server.url("/images.zip")
    with pytest.raises(
        DataError, match=r"cannot be reached \(Connection refused\): check the connection to the network"
    ):
        fetch_file(address, path)


def test_room_is_looked_for_first(server: Loopback, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(path.parent)._replace(free=999_999)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(DataError, match=r"images\.zip takes 1,000,000 more bytes and .* has 999,999 free: make room"):
        fetched(server, path)
    server.faults += [Fault(cut=1)]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free._replace(free=10**7))
    assert fetched(server, path) == CONTENT


def test_a_full_disk_keeps_the_part(server: Loopback, path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, hard))
    try:
        with pytest.raises(
            DataError, match=r"images\.zip\.part cannot be written \(File too large\);.*make room and call"
        ):
            fetched(server, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert fetched(server, path) == CONTENT
    assert server.ranges == [None, "bytes=600000-"]


def test_a_killed_process_is_continued(server: Loopback, path: Path) -> None:
    stall = threading.Event()
    server.faults += [Fault(cut=700_000, stall=stall)]
    child = multiprocessing.get_context("fork").Process(target=fetch_file, args=(server.url("/images.zip"), path))
    child.start()
    part = path.with_name("images.zip.part")
    deadline = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size >= 500_000):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.kill()
    child.join()
    stall.set()
    there = part.stat().st_size
    assert fetched(server, path) == CONTENT
    assert server.ranges == [None, f"bytes={there}-"]
