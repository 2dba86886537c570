"""An HTTP server on loopback that misbehaves as it is told."""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Fault:
    """What is wrong with one response; without anything, nothing is.

    Attributes:
        status: Answer with this error.
        cut: Send as many bytes of the body and break off.
        length: Content-Length to declare instead of the true one; -1 declares none.
        whole: Take no notice of a range that is asked for.
        start: Send the part from here, whatever was asked for.
        stall: Wait for this before breaking off.
    """

    status: int | None = None
    cut: int | None = None
    length: int | None = None
    whole: bool = False
    start: int | None = None
    stall: threading.Event | None = None


@dataclass
class Loopback:
    """Files by path and version, faults of the responses to come (of one path, if named), and what was asked for."""

    address: str
    files: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=lambda: {"ETag": '"first"'})
    faults: deque[Fault] = field(default_factory=deque)
    ranges: list[str | None] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    faulty_path: str | None = None

    def url(self, path: str) -> str:
        return f"{self.address}{path}"


def _handler(server: Loopback) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            server.paths.append(self.path)
            server.ranges.append(self.headers.get("Range"))
            is_faulty = server.faults and server.faulty_path in (None, self.path)
            fault = server.faults.popleft() if is_faulty else Fault()
            content = server.files.get(self.path)
            if fault.status or content is None:
                self.send_error(fault.status or 404)
                return
            start = self._start(fault)
            if start is not None and start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.end_headers()
                return
            body = content[start or 0 :]
            self.send_response(200 if start is None else 206)
            if start is not None:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            length = len(body) if fault.length is None else fault.length
            if length >= 0:
                self.send_header("Content-Length", str(length))
            for name, value in server.headers.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(ConnectionError):  # who has asked may be gone
                self.wfile.write(body[: fault.cut])
            if fault.stall:
                self.wfile.flush()
                fault.stall.wait(30)

        def _start(self, fault: Fault) -> int | None:
            asked = self.headers.get("Range")
            is_same = self.headers.get("If-Range") in server.headers.values()
            if asked is None or fault.whole or not is_same:
                return None
            return int(asked.removeprefix("bytes=").removesuffix("-")) if fault.start is None else fault.start

    return Handler


@contextmanager
def loopback() -> Iterator[Loopback]:
    server = Loopback("")
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(server)) as listening:
        server.address = f"http://127.0.0.1:{listening.server_port}"
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            listening.shutdown()
            thread.join()
