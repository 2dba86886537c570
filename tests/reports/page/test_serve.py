"""The report on this machine's own address."""

from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread

import pytest

from fishr.reports.page.serve import Server
from runs_to_show import write_run


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("fishr.reports.page.serve.LEAST_AGE", 0.0)
    with Server([tmp_path], 0) as running:
        Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield running
        running.shutdown()


def get(server: Server, path: str, **headers: str) -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", server.server_port)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_it_waits_for_the_first_run(server: Server, tmp_path: Path) -> None:
    status, page = get(server, "/")
    assert status == 200
    assert "Nothing to show yet" in page
    assert f"there is no run in {tmp_path}" in page
    write_run(tmp_path / "run", draw=None)
    assert "50.0 % on west, held out" in get(server, "/")[1]


def test_the_version_changes_with_the_page_alone(server: Server, tmp_path: Path) -> None:
    write_run(tmp_path / "run", draw=None)
    first, again = get(server, "/version"), get(server, "/version")
    assert first == again
    write_run(tmp_path / "other", draw=None, trial=1)
    assert get(server, "/version") != first


def test_requests_by_another_name_are_refused(server: Server) -> None:
    assert get(server, "/", Host="evil.example")[0] == 403
    assert get(server, "/", Host=f"localhost:{server.server_port}")[0] == 200
    assert get(server, "/runs/run/config.json")[0] == 404
