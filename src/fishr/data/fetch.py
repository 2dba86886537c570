"""Getting one file over HTTP, however often the connection breaks.

What has arrived lies in ``NAME.part``, and in ``NAME.tag`` the version of the file that it is a part of: its ETag, or
its time of change. A part is continued by a range request that holds for this version only (RFC 9110, If-Range); a
server that has another version, or knows no ranges, sends the whole file, and it starts anew.
"""

import errno
import hashlib
import http.client
import logging
import re
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import NamedTuple

from fishr.errors import DataError

logger = logging.getLogger(__name__)

BytesProgress = Callable[[str, int, int | None], None]
"""``(name of the file, bytes that are there, bytes of the whole or None if unknown)``."""

TIMEOUT_SECONDS = 30.0
RETRIES = 6
"""Failures in a row, without a byte more than ever before, until it is given up."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 30.0
"""Pause after the first failure, which doubles with each further one, and its bound."""

CHUNK_BYTES = 2**18

_TRY_AGAIN = frozenset({408, 425, 429})
"""Statuses below 500 that may be others the next time: timeout, too early, too many requests."""

_NO_WAY_THERE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ECONNREFUSED)
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)")


def fetch_file(
    url: str, path: Path, *, size: int | None = None, sha256: str | None = None, on_bytes: BytesProgress | None = None
) -> None:
    """Download a file, or continue to; a file that is there is left as it is.

    Args:
        url: Where it is.
        path: What it is to be called; its folder has to exist.
        size: Its size in bytes, where that is known from elsewhere.
        sha256: Its SHA-256, in hexadecimal digits, where that is known.
        on_bytes: Is told how much is there.

    Raises:
        DataError: the server cannot be reached, does not have the file, or keeps breaking off; it sends other than
            ``size`` and ``sha256`` say; the disk has no room. Except for wrong content, what has arrived stays.
    """
    if path.is_file():
        return
    download = _Download(url, path, path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.tag"), size)
    most, failures, answered = download.bytes_there(), 0, False
    while True:
        try:
            download.attempt(on_bytes)
            break
        except _BrokenError as broken:
            answered = answered or not broken.is_final
            if not answered:
                raise DataError(
                    f"{url} cannot be reached ({broken}): check the connection to the network, then call again"
                ) from broken
            there = download.bytes_there()
            failures = 1 if there > most else failures + 1
            most = max(most, there)
            if failures > RETRIES:
                raise DataError(
                    f"{url} failed {failures} times in a row ({broken}); {there:,} bytes are there and stay in "
                    f"{path.parent}: call again later, it continues"
                ) from broken
            logger.info("%s %s, trying again", url, broken)
            time.sleep(min(FIRST_PAUSE_SECONDS * 2 ** (failures - 1), LONGEST_PAUSE_SECONDS))
    download.finish(sha256)


class _BrokenError(Exception):
    """Why an attempt failed that may succeed the next time; ``is_final``: unless it is the first one."""

    def __init__(self, reason: str, *, is_final: bool = False) -> None:
        super().__init__(reason)
        self.is_final = is_final


class _Download(NamedTuple):
    url: str
    path: Path
    part: Path
    tag: Path
    size: int | None

    def bytes_there(self) -> int:
        """Size of the part, 0 if it cannot be continued because nothing tells what it is a part of."""
        return self.part.stat().st_size if self.part.exists() and self._tag() else 0

    def attempt(self, on_bytes: BytesProgress | None) -> None:
        """Ask for what is missing and append it to the part; returns when nothing is missing.

        Raises:
            _BrokenError: something is still missing.
            DataError: another attempt would not help.
        """
        there = self.bytes_there()
        if there and there == self.size:
            return
        response = self._open(there)
        if response is None:
            self._check_size(there)
            return
        with response:
            declared = self._start(response, there)
            there = self.bytes_there()
            expected = declared if self.size is None else self.size
            if declared is not None:
                self._check_size(declared)
            self._check_room((expected or 0) - there)
            there = self._receive(response, there, expected, on_bytes)
        if expected is not None and there > expected:
            self.discard()
            raise DataError(f"{self.url} sent {there:,} bytes, expected {expected:,}: call again, it starts anew")
        if expected is not None and there < expected:
            raise _BrokenError(f"broke off after {there:,} of {expected:,} bytes")

    def finish(self, sha256: str | None) -> None:
        """Check the whole and give it its name."""
        if sha256 is not None:
            with self.part.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256:
                self.discard()
                raise DataError(
                    f"{self.url} sent content with SHA-256 {found}, expected {sha256}: call again, it starts anew"
                )
        self.part.replace(self.path)
        self.tag.unlink(missing_ok=True)

    def discard(self) -> None:
        self.tag.unlink(missing_ok=True)
        self.part.unlink(missing_ok=True)

    def _open(self, there: int) -> http.client.HTTPResponse | None:
        """The response to a request for what is missing; None if the server says that nothing is."""
        headers = {"Accept-Encoding": "identity", "User-Agent": "fishr"}
        if there:
            headers |= {"Range": f"bytes={there}-", "If-Range": self._tag()}
        try:
            opened: http.client.HTTPResponse = urllib.request.urlopen(
                urllib.request.Request(self.url, headers=headers), timeout=TIMEOUT_SECONDS
            )
        except urllib.error.HTTPError as error:
            status = f"{error.code} {http.client.responses.get(error.code, '')}".rstrip()
            with error:
                if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and there:
                    if _content_range(error.headers)[1] == there:
                        return None
                    self.discard()
                    raise _BrokenError("has less than has arrived") from error
                if error.code >= 500 or error.code in _TRY_AGAIN:
                    raise _BrokenError(f"says {status}") from error
            raise DataError(
                f"{self.url} says {status}: expected the file; it may have moved, ask its makers"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise _broken(error) from error
        return opened

    def _start(self, response: http.client.HTTPResponse, there: int) -> int | None:
        """Make the part ready for what the response brings; returns the size of the whole file, if it is said."""
        version = _version(response.headers)
        if response.status == http.HTTPStatus.PARTIAL_CONTENT:
            start, total = _content_range(response.headers)
            if start != there or version != self._tag():
                self.discard()
                raise _BrokenError("sent another part than was asked for")
            return total
        # The tag goes first and comes last: a part without one is no part of anything.
        self.discard()
        self.part.touch()
        self.tag.write_text(version, encoding="latin-1")
        length = response.headers.get("Content-Length", "")
        return int(length) if length.isdecimal() else None

    def _receive(
        self, response: http.client.HTTPResponse, there: int, expected: int | None, on_bytes: BytesProgress | None
    ) -> int:
        """Append what the response brings; returns the bytes that are there then."""
        with self.part.open("ab", buffering=0) as file:  # a full disk is an error here, and not once more at closing
            while True:
                if on_bytes is not None:
                    on_bytes(self.path.name, there, expected)
                try:
                    chunk = response.read(CHUNK_BYTES)
                except (OSError, http.client.HTTPException) as error:
                    raise _broken(error) from error
                if not chunk:
                    return there
                try:
                    rest = memoryview(chunk)
                    while rest:
                        rest = rest[file.write(rest) :]
                except OSError as error:
                    raise DataError(
                        f"{self.part} cannot be written ({error.strerror}); {there:,} bytes are there and stay: make "
                        "room and call again, it continues"
                    ) from error
                there += len(chunk)

    def _tag(self) -> str:
        return self.tag.read_text(encoding="latin-1") if self.tag.exists() else ""

    def _check_size(self, found: int) -> None:
        if self.size not in (None, found):
            self.discard()
            raise DataError(f"{self.url} has {found:,} bytes, expected {self.size:,}: the source is damaged, ask there")

    def _check_room(self, needed: int) -> None:
        free = shutil.disk_usage(self.part.parent).free
        if needed > free:
            raise DataError(
                f"{self.path.name} takes {needed:,} more bytes and {self.part.parent} has {free:,} free: make room and "
                "call again, or name another place"
            )


def _version(headers: Message) -> str:
    """What If-Range compares: a strong ETag, or else the time of change; empty if the server tells neither."""
    etag = headers.get("ETag", "")
    return headers.get("Last-Modified", "") if etag.startswith("W/") or not etag else etag


def _content_range(headers: Message) -> tuple[int | None, int | None]:
    """Where the part starts, and the bytes of the whole; None for what is not said."""
    match = _CONTENT_RANGE.match(headers.get("Content-Range", ""))
    if match is None:
        return None, None
    start, total = (None if number is None else int(number) for number in match.groups())
    return start, total


def _broken(error: Exception) -> _BrokenError:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    no_name_or_trust = isinstance(reason, socket.gaierror | ssl.SSLCertVerificationError)
    is_final = no_name_or_trust or getattr(reason, "errno", None) in _NO_WAY_THERE
    return _BrokenError(getattr(reason, "strerror", None) or str(reason) or type(reason).__name__, is_final=is_final)
