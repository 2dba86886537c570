"""The package in examples/ does what its README says: installed, fishr finds what it adds."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "fishr-example"

COMMANDS = """
import contextlib, io, json, sys
from fishr.cli import main
said = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = main(arguments)
    said.append([code, stdout.getvalue(), stderr.getvalue()])
print(json.dumps(said))
"""


def run(commands: list[list[str]], folder: Path, *path: Path) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of commands in one process that also finds what is installed in ``path``."""
    # The caches and settings of whoever runs the tests play no part.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "COLUMNS": "200"}
    process = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)],
        cwd=folder,
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    said: list[Any] = json.loads(process.stdout)
    return [(code, stdout, stderr) for code, stdout, stderr in said]


def train(*arguments: str, output: str) -> list[str]:
    return ["train", "--data", "two-moons", *arguments, "--steps", "4", "--output", output, "--quiet"]


def files() -> set[Path]:
    return {path for path in EXAMPLE.rglob("*") if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    before = files()
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(EXAMPLE)]
    subprocess.run(command, check=True)
    assert files() == before
    return target


def test_installed_it_adds_its_algorithm_and_its_dataset(installed: Path, tmp_path: Path) -> None:
    listed, first, again, by_module = run(
        [
            ["algorithms", "list", "--json"],
            train("--algorithm", "mean-matching", output="run"),
            train("--algorithm", "mean-matching", output="run"),
            train("--json", "--algorithm", "fishr_example.mean_matching:MeanMatching", output="other"),
        ],
        tmp_path,
        installed,
    )
    assert [code for code, _, _ in (listed, first, again, by_module)] == [0, 0, 0, 0], (listed, first, again, by_module)

    algorithms = {each["name"]: each for each in json.loads(listed[1])["algorithms"]}
    assert list(algorithms)[-1] == "mean-matching"
    assert "fishr" in algorithms
    assert algorithms["mean-matching"] == {
        "name": "mean-matching",
        "title": "Mean matching",
        "year": 2014,
        "idea": "Equal mean features in all domains.",
        "reference": "Tzeng, Hoffman, Zhang, Saenko, Darrell: Deep Domain Confusion: Maximizing for Domain Invariance, "
        "2014, arXiv 1412.3474",
    }

    assert "Trained: accuracy in % of the model kept (step 4 of 4)" in first[1]
    assert [line.split()[1:5] for line in first[1].splitlines() if "right" in line] == [["right", "│", "held", "out"]]
    assert "Done before, nothing to do" in again[1]
    assert json.loads(by_module[1])["trained"] is True

    # The same training by another name: records are the same, the run is not.
    records = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("run", "other")]
    assert without_time(records[0]) == without_time(records[1])


def without_time(records: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in records.splitlines()]


def test_without_it_the_error_lists_what_is_known(tmp_path: Path) -> None:
    no_algorithm, no_dataset, no_module = run(
        [
            ["algorithms", "show", "mean-matching"],
            train(output="run"),
            ["algorithms", "show", "fishr_example.mean_matching:MeanMatching"],
        ],
        tmp_path,
    )
    code, stdout, stderr = no_algorithm
    assert (code, stdout) == (2, "")
    assert stderr.startswith("fishr: error: unknown algorithm 'mean-matching' (known: andmask, arm, ")
    assert " fishr, " in stderr

    code, stdout, stderr = no_dataset
    assert (code, stdout) == (2, "")
    assert stderr.startswith("fishr: error: unknown dataset 'two-moons' (known: colored-digits, ")
    assert stderr.endswith("), and there is no folder or manifest two-moons\n")

    code, stdout, stderr = no_module
    assert (code, stdout) == (2, "")
    assert stderr.endswith("ModuleNotFoundError: No module named 'fishr_example'\n")
    assert not list(tmp_path.iterdir())


def test_its_own_tests_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    tests = {
        name: test
        for name, test in runpy.run_path(str(EXAMPLE / "tests" / "test_example.py")).items()
        if name.startswith("test_")
    }
    assert {"test_the_algorithm_keeps_the_contract", "test_the_dataset_keeps_the_contract"} < set(tests)
    for test in tests.values():
        test()


def test_pictures_as_arrays(data_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(EXAMPLE.parent / "arrays_pacs.py"))
    example["main"](["--data-root", str(data_root), "--subset", "80", "--epochs", "10", "--seeds", "2"])
    title, header, _, *rows = capsys.readouterr().out.splitlines()
    assert title == "320 images, 1828 features; accuracy in % on the held-out domain, 2 seeds"
    assert [cell.strip() for cell in header.split("|")[1:-1]] == [
        "held out",
        "art_painting",
        "cartoon",
        "photo",
        "sketch",
        "mean",
    ]
    assert [row.split()[1] for row in rows] == ["ERM", "Fishr"]
    assert all(float(row.split("|")[-2]) > 100 / 7 + 5 for row in rows)  # 7 classes
