"""``kill -9`` of a process, of a node and of the driver: the sweep ends with the table of an undisturbed one."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import SoftFileLease

from fishr.cli import main
from fishr.records import LEASE_FILE, LEASE_SECONDS
from small_sweeps import wait_for

ARGUMENTS = [
    *("--datasets", "colored-digits", "--algorithms", "erm", "fishr", "--test-domain", "-90%", "--subset", "60"),
    *("--draws", "1", "--trials", "1", "--steps", "3000", "--checkpoint-every", "100", "--quiet"),
]
TIMES = ("hours",)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fishr.cli", "sweep", "run", *ARGUMENTS, "--output", str(folder), *arguments]
    return subprocess.Popen(command)


def table(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    """What is reported, but for times."""
    capsys.readouterr()
    assert main(["report", str(folder), "--selection", "all", "--format", "csv"]) == 0
    rows = csv.DictReader(capsys.readouterr().out.splitlines())
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def undisturbed(folder: Path, *arguments: str) -> Path:
    assert start(folder, *arguments).wait() == 0
    return folder


def runs_with(folder: Path, what: str) -> set[Path]:
    return {folder / "runs" / path.relative_to(folder / "runs").parts[0] for path in folder.glob(f"runs/*/{what}")}


def process_of(run: Path) -> int:
    owner = SoftFileLease(run / LEASE_FILE, lease_duration=LEASE_SECONDS).owner
    assert owner is not None
    return owner.pid


def test_of_a_process_and_of_the_driver(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "sweep"
    driver = start(folder, "--slots", "1")
    wait_for(lambda: bool(runs_with(folder, "checkpoints/step-*")))
    (first,) = runs_with(folder, "checkpoints/step-*")
    os.kill(process_of(first), signal.SIGKILL)
    wait_for(lambda: bool(runs_with(folder, "checkpoints/step-*") - {first}))
    assert (first / "DONE").exists()
    driver.kill()
    driver.wait()
    assert len(runs_with(folder, "DONE")) == 1
    wait_for(lambda: not runs_with(folder, ".lease"))
    assert start(folder, "--slots", "1").wait() == 0
    assert table(folder, capsys) == table(undisturbed(tmp_path / "undisturbed", "--slots", "1"), capsys)


def test_of_a_ray_node_and_of_the_driver(cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "sweep"
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    on_ray = ("--executor", "ray", "--address", cluster.address)
    driver = start(folder, *on_ray)
    wait_for(lambda: len(runs_with(folder, "checkpoints/step-*")) == 2)
    cluster.remove_node(nodes[0], allow_graceful=False)
    assert len(runs_with(folder, "DONE")) < 2
    wait_for(lambda: bool(runs_with(folder, "DONE")))
    driver.kill()
    driver.wait()
    assert start(folder, *on_ray).wait() == 0
    assert table(folder, capsys) == table(undisturbed(tmp_path / "undisturbed", *on_ray), capsys)
