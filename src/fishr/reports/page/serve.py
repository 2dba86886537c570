"""The page on this machine's own address, anew when runs have changed."""

import hashlib
import sys
import time
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from fishr.errors import ConfigError, FishrError, RunError
from fishr.reports.page.build import page_of
from fishr.reports.page.parts import Page
from fishr.reports.page.render import rendered

HOST = "127.0.0.1"
LEAST_AGE = 2.0
"""Seconds for which a page is not looked at anew."""


class Server(ThreadingHTTPServer):
    """Serves the report of folders to browsers on this machine.

    ``/`` is the page, ``/version`` changes whenever it does.

    Args:
        paths: Folders of runs, of commands that make several, and of analyses.
        port: The port; 0 for any that is free.

    Raises:
        ConfigError: the port is taken.
        RunError: a path is no folder.
    """

    daemon_threads = True

    def __init__(self, paths: Sequence[Path], port: int) -> None:
        for path in paths:
            if not path.is_dir():
                raise RunError(f"{path} is no folder: give folders with runs in them")
        self.paths, self.lock = paths, Lock()
        self.page: Page | None = None
        self.content, self.version, self.looked = "", "", -LEAST_AGE
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise ConfigError(f"port {port} cannot be used ({error.strerror}): give another --port") from None

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_port}"

    def look(self) -> tuple[str, str]:
        """The page as it is now and its version; the last one while folders cannot be read."""
        with self.lock:
            if time.monotonic() - self.looked > LEAST_AGE:
                try:
                    page = page_of(self.paths)
                except (FishrError, OSError) as error:  # files come and go while runs are made
                    page = Page("Nothing to show yet", [str(error)], []) if self.page is None else self.page
                if page != self.page:
                    self.page = page
                    self.version = hashlib.sha256(rendered(page).encode()).hexdigest()
                    self.content = rendered(page, self.version)
                self.looked = time.monotonic()
            return self.content, self.version

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that goes away in the middle of a page is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        # A page of another site whose name was made to point here has that name in its requests.
        # The port is not compared: it is another one where it was forwarded.
        if self.headers.get("Host", "").partition(":")[0].lower() not in (HOST, "localhost"):
            self.send_error(HTTPStatus.FORBIDDEN)
        elif self.path == "/":
            self._send(self.server.look()[0], "text/html; charset=utf-8")
        elif self.path == "/version":
            self._send(self.server.look()[1], "text/plain")
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _send(self, text: str, kind: str) -> None:
        content = text.encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None: ...
