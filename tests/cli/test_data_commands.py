"""``fishr data list``, ``prepare`` and ``download`` as their users meet them."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from fishr.cli import main
from fishr.cli.data import progress
from fishr.data import download, fetch
from fishr.data.listing import BENCHMARKS, BenchmarkLayout
from loopback import Fault, Loopback, loopback
from small_archives import HOME, folder_of, tar_of, zip_of


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetch, "FIRST_PAUSE_SECONDS", 0.0)
    with loopback() as server:
        yield server


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root for a small benchmark in the place of DomainNet."""
    layout = BenchmarkLayout("domain_net", ("Art", "Real World"), (len(HOME),), 2, "ask its makers")
    monkeypatch.setitem(BENCHMARKS, "domain-net", layout)  # type: ignore[arg-type]
    return tmp_path / "root"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that succeeds prints."""
    assert main(["data", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command that must fail with exit code 2 and one line."""
    assert main(["data", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


class TestList:
    def test_table(self, capsys: pytest.CaptureFixture[str], root: Path) -> None:
        folder_of(root / "domain_net", {**HOME, "Art/Bed/3.jpg": b""})
        shown = run(capsys, "list", "--data-root", str(root))
        assert "terra-incognita" in shown
        assert f"Data root: {root}\n" in shown
        assert "pacs: get it with: fishr data download pacs\n" in shown
        assert "then: fishr data prepare vlcs ARCHIVE\n" in shown
        assert "domain-net is not as it should be: images: expected 8, found 9\n" in shown

    def test_json(self, capsys: pytest.CaptureFixture[str], root: Path) -> None:
        folder_of(root / "domain_net", HOME)
        shown = json.loads(run(capsys, "list", "--data-root", str(root), "--json"))
        assert shown["data_root"] == str(root)
        datasets = {dataset.pop("name"): dataset for dataset in shown["datasets"]}
        assert datasets["domain-net"] == {
            "domains": ["Art", "Real World"],
            "images": [8],
            "classes": 2,
            "state": "complete",
            "problem": "",
            "source": "ask its makers",
        }
        assert datasets["terra-incognita"]["images"] == [24_788, 24_330]
        assert datasets["rotated-mnist"]["state"] == "missing"


class TestPrepare:
    def test_text(self, capsys: pytest.CaptureFixture[str], root: Path) -> None:
        archive = zip_of(root.parent / "[red]a.zip", HOME)
        arguments = ("prepare", "domain-net", str(archive), "--data-root", str(root))
        counts = "8 images (Art 4, Real World 4), 2 classes\n"
        assert run(capsys, *arguments) == f"domain-net is built, complete: {root / 'domain_net'}\n{counts}"
        assert run(capsys, *arguments) == f"domain-net was there already, complete: {root / 'domain_net'}\n{counts}"

    def test_json(self, capsys: pytest.CaptureFixture[str], root: Path) -> None:
        archives = [
            str(zip_of(root.parent / f"{domain}.zip", {name: HOME[name] for name in HOME if name.startswith(domain)}))
            for domain in ("Art", "Real World")
        ]
        assert json.loads(run(capsys, "prepare", "domain-net", *archives, "--data-root", str(root), "--json")) == {
            "dataset": "domain-net",
            "folder": str(root / "domain_net"),
            "domains": {"Art": 4, "Real World": 4},
            "classes": 2,
            "was_there": False,
        }

    def test_mistakes(self, capsys: pytest.CaptureFixture[str], root: Path) -> None:
        archive = tar_of(root.parent / "[red]\na.tar", {"../\x1b[31m.jpg": b""})
        place = ("--data-root", str(root))
        assert "unknown benchmark 'domainnet'" in error_of(capsys, "prepare", "domainnet", str(archive), *place)
        assert "no such file: /nowhere.zip" in error_of(capsys, "prepare", "domain-net", "/nowhere.zip", *place)
        assert "[red] a.tar is refused and nothing of it unpacked, its member '../\\x1b[31m.jpg' leads" in error_of(
            capsys, "prepare", "domain-net", str(archive), *place
        )
        assert "Missing argument 'ARCHIVE...'" in error_of(capsys, "prepare", "domain-net")


class TestDownload:
    def test_benchmark(
        self, capsys: pytest.CaptureFixture[str], root: Path, server: Loopback, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(download, "URLS", {"domain-net": (server.url("/all.zip"),)})
        server.files["/all.zip"] = zip_of(root.parent / "all.zip", HOME).read_bytes()
        server.faults += [Fault(cut=200)]
        shown = run(capsys, "download", "domain-net", "--data-root", str(root))
        assert shown == (
            f"domain-net is downloaded, complete: {root / 'domain_net'}\n8 images (Art 4, Real World 4), 2 classes\n"
        )

    def test_datasets_made_of_mnist(self, capsys: pytest.CaptureFixture[str], data_root: Path) -> None:
        folder = data_root / "MNIST" / "raw"
        shown = run(capsys, "download", "rotated-mnist", "--data-root", str(data_root))
        assert shown == f"rotated-mnist is made of MNIST, which is there, complete: {folder}\n"
        shown = run(capsys, "download", "rotated-mnist", "--data-root", str(data_root), "--json")
        assert json.loads(shown) == {"dataset": "rotated-mnist", "folder": str(folder)}

    def test_datasets_without_files(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(capsys, "download", "colored-digits") == "colored-digits needs no files: nothing to download\n"

    def test_mistakes(self, capsys: pytest.CaptureFixture[str], root: Path) -> None:
        place = ("--data-root", str(root))
        assert "unknown dataset 'pcas'; did you mean 'pacs'?" in error_of(capsys, "download", "pcas", *place)
        message = error_of(capsys, "download", "vlcs", *place)
        assert "vlcs cannot be downloaded: only drive links lead to it" in message
        assert "fishr data prepare vlcs ARCHIVE" in message

    def test_no_network(self, capsys: pytest.CaptureFixture[str], root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with loopback() as server:
            monkeypatch.setattr(download, "URLS", {"domain-net": (server.url("/all.zip"),)})
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        message = error_of(capsys, "download", "domain-net", "--data-root", str(root))
        assert "/all.zip cannot be reached (Connection refused): check the connection to the network" in message


def test_progress_in_bytes_and_images(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(force_terminal=True, width=100, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    monkeypatch.setattr(progress, "stderr", console)
    with console.file, progress.watchers(quiet=False) as watching:
        watching.on_bytes("[red]clipart.zip", 500_000, 1_000_000)
        watching.on_bytes("list.txt", 500, None)
        watching.on_files("writing domain-net", 7, 9)
    shown = console.export_text()
    assert "[red]clipart.zip" in shown
    assert "0.5/1.0 MB" in shown
    assert "500/? bytes" in shown
    assert "7/9" in shown


def test_nothing_is_drawn_for_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "stderr", Console(force_terminal=True))
    with progress.watchers(quiet=True) as watching:
        assert watching == (None, None)


def test_interrupt_leaves_at_once_and_keeps_the_part(server: Loopback, root: Path) -> None:
    stall = threading.Event()
    server.files["/all.zip"] = bytes(1_000_000)
    server.faults += [Fault(cut=700_000, stall=stall)]
    script = (
        "import sys; from fishr.cli import main; from fishr.data import download;"
        f"download.URLS = {{'domain-net': ({server.url('/all.zip')!r},)}};"
        f"sys.exit(main(['data', 'download', 'domain-net', '--data-root', {str(root)!r}]))"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    part = root / ".downloads" / "domain-net" / "all.zip.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size >= 500_000):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, shown = child.communicate(timeout=20)
    stall.set()
    assert child.returncode == 130
    assert shown == "fishr: interrupted\n"
    assert part.stat().st_size >= 500_000


@pytest.mark.parametrize("command", ["list", "prepare", "download"])
def test_help_shows_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Examples" in run(capsys, command, "--help")
