"""``fishr algorithms``, and algorithms and datasets named by their module."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

import fishr.algorithms.describe
from fishr.algorithms import ALGORITHMS
from fishr.algorithms.describe import describe
from fishr.cli import main

MODULE = '''
import torch
from fishr.algorithms import ERM
from fishr.data import MultiDomainDataset, Samples


class Mine(ERM):
    """Minimise [red]mine[/red]."""

    title = "Mine"


class Untitled(ERM.__mro__[1]):
    """Minimise nothing."""


def points(root=None, seed=0, subset=None, *, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    domains = {
        name: Samples(scale * torch.randn(20, 2, generator=generator)[:subset], torch.arange(20)[:subset] % 2)
        for name in ("a", "b", "c")
    }
    return MultiDomainDataset("points", "vectors", domains, ("even", "odd"), test_domain="c")
'''


@pytest.fixture
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with a module in it."""
    (tmp_path / "mine_of_tests.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    sys.modules.pop("mine_of_tests", None)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    """What a command that must leave with this exit code writes on stdout and stderr."""
    assert main(arguments) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    out, err = printed(capsys, *arguments, code=2)
    assert out == ""
    (line,) = err.splitlines()
    return line


# list


def test_list_has_a_line_for_each(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out, err = printed(capsys, "algorithms", "list")
    assert err == ""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == list(ALGORITHMS)
    assert ["vrex", "V-REx", "2021", "Equal risks in all domains."] in rows
    assert out.splitlines()[-1] == "More about one: fishr algorithms show NAME"


def test_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = printed(capsys, "algorithms", "list", "--json")
    algorithms = json.loads(out)["algorithms"]
    assert err == ""
    assert [each["name"] for each in algorithms] == list(ALGORITHMS)
    assert algorithms[0] == {
        "name": "erm",
        "title": "ERM",
        "year": 1998,
        "idea": "Minimise the mean loss over the samples of all domains.",
        "reference": "Vapnik: Statistical Learning Theory, Wiley 1998",
    }


def test_another_packages_mistake_hides_no_other(
    capsys: pytest.CaptureFixture[str], working_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(working_directory)
    info = working_directory / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    points = ("mine = mine_of_tests:Mine", "lost = nowhere_of_tests:Lost", "untitled = mine_of_tests:Untitled")
    (info / "entry_points.txt").write_text("\n".join(("[fishr.algorithms]", *points)))
    out, err = printed(capsys, "algorithms", "list", "--json")
    names = [each["name"] for each in json.loads(out)["algorithms"]]
    assert set(names) == {*ALGORITHMS} - {"lost", "untitled"}
    assert "mine" in names
    assert sorted(err.splitlines()) == [
        "fishr: warning: algorithm 'lost' cannot be imported as package.module:Name: ModuleNotFoundError: No module "
        "named 'nowhere_of_tests'",
        "fishr: warning: algorithm 'untitled' does not describe itself: it has no reference",
    ]


# show


def test_show_fishr(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = printed(capsys, "algorithms", "show", "fishr")
    assert err == ""
    assert out.startswith(
        "Fishr (2022): Equal variances of the per-sample gradients in all domains.\n"
        "\n"
        "objective = 1/n Σ_i ℓ_i + λ · 1/|E| Σ_e ‖v_e − v̄‖² (scaled as reduction says)\n"  # noqa: RUF001
        "\n"
        "with v_e the variance over the samples of domain e of the head's gradient, computed in closed form by\n"
    )
    assert (
        "\n"
        "penalty_weight = 1000\n"
        "    λ, the weight from the switch-on step on.\n"
        "    Searched: log-uniform 10 to 10000\n"
        "strength = null (0.5 on data of your own)\n"
        "    ρ, the norm of "  # noqa: RUF001
    ) in out
    assert "\nrescale = false\n    Divide " in out
    assert "\nreset_optimizer = true\n    Forget " in out
    assert (
        "\n"
        "lr = 0.001 for vectors and small images; 5e-05 for images\n"
        "    Learning rate of Adam.\n"
        "    Searched: log-uniform 3.1623e-05 to 0.0031623 for vectors and small images; log-uniform 1e-05 to "
        "0.00031623 for images\n"
    ) in out
    assert out.splitlines()[-1] == f"Reference: {ALGORITHMS['fishr'].reference}"


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_show_as_json_is_the_description(capsys: pytest.CaptureFixture[str], name: str) -> None:
    out, err = printed(capsys, "algorithms", "show", name, "--json")
    assert json.loads(out) == json.loads(json.dumps(asdict(describe(name))))
    assert err == ""


def test_show_tells_the_cost_of_a_step(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "step_costs.json").write_text('{"irm": {"MLP": 1.5, "ResNet-18": 1.04}}')
    monkeypatch.setattr(fishr.algorithms.describe, "files", lambda package: tmp_path)
    out, _ = printed(capsys, "algorithms", "show", "irm")
    assert (
        "\nA step takes about 1.5 times as long as ERM's (MLP).\nA step takes about 1.0 times as long as ERM's (R"
        in out
    )
    assert "A step takes" not in printed(capsys, "algorithms", "show", "erm")[0]


def test_show_an_unknown_one(capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, "algorithms", "show", "coarl")
    assert message.startswith("fishr: error: unknown algorithm 'coarl'; did you mean 'coral'? (known: andmask, ")


def test_show_needs_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Missing argument" in error_of(capsys, "algorithms", "show")


# package.module:Name in the working directory


def test_show_one_in_the_working_directory(capsys: pytest.CaptureFixture[str], working_directory: Path) -> None:
    out, err = printed(capsys, "algorithms", "show", "mine_of_tests:Mine")
    assert out.startswith("Mine (1998): Minimise [red]mine[/red].\n")
    assert err == ""


def test_train_what_lies_in_the_working_directory(capsys: pytest.CaptureFixture[str], working_directory: Path) -> None:
    arguments = ["train", "--data", "mine_of_tests:points", "--algorithm", "mine_of_tests:Mine"]
    arguments += ["--steps", "2", "--output", "run", "--quiet"]
    assert "Trained: " in printed(capsys, *arguments)[0]
    assert json.loads((working_directory / "run" / "config.json").read_text())["algorithm"] == "mine_of_tests:Mine"
    assert "Done before" in printed(capsys, *arguments)[0]
    assert (working_directory / "run" / "DONE").exists()


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--algorithm", "mine_of_tests:Yours", "AttributeError: module 'mine_of_tests' has no attribute 'Yours'"),
        ("--algorithm", "yours_of_tests:Mine", "ModuleNotFoundError: No module named 'yours_of_tests'"),
        ("--algorithm", "mine_of_tests:points", "'mine_of_tests:points' is no algorithm: got <function points at "),
        ("--algorithm", "fishr.training:RunConfig", "is no algorithm: got <class 'fishr.training.config.RunConfig'>"),
        ("--algorithm", "mine_of_tests", "unknown algorithm 'mine_of_tests' (known: "),
        ("--data", "mine_of_tests:torch", "is no dataset: got <module 'torch'"),
        ("--data", "./images:old", "unknown dataset './images:old'"),
    ],
)
def test_a_name_in_a_module_that_cannot_be(
    capsys: pytest.CaptureFixture[str], working_directory: Path, option: str, name: str, message: str
) -> None:
    options = {"--data": "mine_of_tests:points", "--algorithm": "erm", option: name}
    said = error_of(capsys, "train", *(part for pair in options.items() for part in pair), "--output", "run")
    assert message in said
    assert said.endswith(f", and there is no folder or manifest {name}") == (option == "--data")
    assert not (working_directory / "run").exists()


def test_a_folder_that_exists_wins_over_a_module(capsys: pytest.CaptureFixture[str], working_directory: Path) -> None:
    (working_directory / "mine_of_tests:points").mkdir()
    said = error_of(capsys, "train", "--data", "mine_of_tests:points", "--output", "run")
    assert "mine_of_tests:points holds no folders with images" in said


@pytest.mark.parametrize("name", ["mine_of_tests:Mine", "mine_of_tests:Yours"])
def test_the_working_directory_is_on_the_path_for_the_import_alone(
    capsys: pytest.CaptureFixture[str], working_directory: Path, name: str
) -> None:
    """Folders in it, such as onnx, would pass for packages."""
    before = list(sys.path)
    main(["algorithms", "show", name])
    assert sys.path == before
