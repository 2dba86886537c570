"""Fixtures that more than one folder of tests needs."""

import logging
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from domainbed_folders import write_sweep


def pytest_configure() -> None:
    """A shell's background jobs ignore SIGINT, and so would all that the tests send it to."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """A data root with the real MNIST: ``$FISHR_DATA``, else ``shared/data`` beside the checkout."""
    if named := os.environ.get("FISHR_DATA"):
        return Path(named)
    beside = Path(__file__).parents[1].parent / "shared" / "data"
    if (beside / "MNIST" / "raw").is_dir():
        return beside
    reason = f"no real MNIST: FISHR_DATA is not set and there is no {beside / 'MNIST' / 'raw'}"
    if os.environ.get("FISHR_REQUIRE_DATA") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def browser() -> str:
    """Chrome or Chromium, which plotly draws images with."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    for name in names:
        if found := shutil.which(name):
            return found
    reason = f"no browser: none of {', '.join(names)} is on the PATH"
    if os.environ.get("FISHR_REQUIRE_BROWSER") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def warnings_logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The warnings that the library has logged so far, whether or not the command line has taken its logger over."""
    monkeypatch.setattr(logging.getLogger("fishr"), "propagate", True)
    return lambda: [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("fishr") and record.levelno >= logging.WARNING
    ]


@pytest.fixture(scope="session")
def domainbed_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as DomainBed leaves them: ``domainbed_folders.write_sweep``."""
    folder = tmp_path_factory.mktemp("domainbed")
    write_sweep(folder)
    return folder
