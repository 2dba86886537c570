"""What the documents show runs: Python blocks, and the commands of each page in their order.

A command runs as it stands there, but for the sizes in :data:`SMALLER`.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import huggingface_hub.constants
import pytest
import timm
from huggingface_hub.utils import close_session
from safetensors.torch import save_file
from typer.main import get_command

import algorithm_pages
from fishr.cli import main
from fishr.cli.app import app, spread_values
from fishr.cli.config_file import with_config_file
from small_runs import picture, write_pictures
from tracked_runs import NOLOAD, keep_trackers_local

ROOT = Path(__file__).parents[1]

WRITTEN = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
PAGES = WRITTEN | {f"docs/{address}": text for address, text in algorithm_pages.pages().items()}
"""Path in the repository to text."""

SMALLER = {
    "fishr analyze": "--subset 20",
    "fishr compare": "--draws 1 --seeds 1 --steps 2",
    "fishr compare pictures": "--image-size 32",
    "fishr demo": "--seeds 1 --steps 10",
    "fishr sweep run": "--draws 2 --trials 1 --steps 2",
    "fishr sweep run --config benchmarks/sweeps/mnist.yaml": "--draws 1 --subset 40",
    "fishr train": "--steps 2",
    "fishr train --data colored-mnist": "--subset 40",
    "fishr train --data rotated-mnist": "--subset 40",
}
"""How a command begins to the sizes that are added to it; the last of a kind wins."""

NOT_RUN = {
    ".ci/run": "runs these tests",
    "fishr sweep run --config benchmarks/sweeps/mnist.yaml --output runs/mnist --executor ray": "needs a Ray cluster",
    "fishr train --data pictures --test-domain sketch --backbone resnet50 --device cuda": "needs four GPUs",
    "fishr train --data pictures --test-domain sketch --backbone resnet50 --precision": "needs a GPU",
    "make": "what .ci/run calls",
    "mlflow ui": "goes on until it is stopped",
    "source": "changes a shell",
    "srun": "needs a scheduler",
    "tensorboard": "goes on until it is stopped",
    "wandb sync": "needs an account",
}
"""How a line begins to why it is not run."""

TAKEN_FOR_GRANTED = {
    "docs/diagnose.md": (
        "docs/your-images.md",
        "fishr train --data pictures --test-domain sketch --backbone mobilenetv2_100 --image",
    ),
}
"""A page to the commands, of another one, whose runs it names; how these begin."""

SMALL = "--backbone test_resnet --no-pretrained --image-size 16 --batch-size 4 --steps 2"

GOES_WRONG = {
    "looks like CLASS/image": ["train --data pictures/sketch"],
    "images cannot be read": [f"train --data damaged.csv {SMALL}"],
    "has no image of class": [f"train --data gaps.csv {SMALL}"],
    "are not in the cache and cannot be downloaded": ["train --data pictures --backbone resnet18"],
    "holds a run with another config": [
        f"train --data pictures --output run {SMALL}",
        f"train --data pictures --output run {SMALL} --set strength=0.2",
    ],
    "compares domains and needs at least 2 to train on": [
        f"train --data pictures --test-domain photo cartoon sketch {SMALL}"
    ],
    "are not all among the model's": [
        f"train --data gaps.csv --output run {SMALL}",
        "evaluate run pictures",
    ],
    "is too short: the minimum": [f"compare pictures --budget 1s {SMALL} --steps 100"],
    "times the loss and hardly acts": [f"train --data pictures {SMALL} --set penalty_weight=1e-9"],
    "the penalty never switches on": [f"train --data pictures {SMALL} --set switch_on=5"],
}
"""What docs/your-images.md says of messages: a part of each, and what leads to it."""

DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")


class Command(NamedTuple):
    """A line of a page."""

    page: str
    line: int
    text: str

    def begins(self, beginnings: dict[str, str]) -> list[str]:
        """What is said of lines that begin so."""
        return [said for beginning, said in beginnings.items() if self.text.startswith(beginning)]

    @property
    def arguments(self) -> list[str]:
        """Those of the ``fishr`` in it."""
        words = shlex.split(self.text)
        return words[words.index("fishr") + 1 :]


def blocks(text: str, language: str) -> Iterator[tuple[int, str]]:
    """The line that each block begins in, and the block."""
    for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield text[: match.start()].count("\n") + 2, match[1]


def commands(page: str, text: str) -> list[Command]:
    found = []
    for first, block in blocks(text, "bash"):
        for match in re.finditer(r"(?:.*\\\n)*.+", block):
            words = shlex.split(match[0].replace("\\\n", " "), comments=True)
            if words:
                found.append(Command(page, first + block[: match.start()].count("\n"), shlex.join(words)))
    return found


COMMANDS = {page: commands(page, text) for page, text in PAGES.items()}
PARSED = [
    pytest.param(command, id=f"{command.page}:{command.line}")
    for of_page in COMMANDS.values()
    for command in of_page
    if command.begins(NOT_RUN) and "fishr" in command.text.split()
]
"""What is not run all the same is what the command line takes."""
PYTHON = [
    pytest.param(block, id=f"{page}:{line}") for page, text in PAGES.items() for line, block in blocks(text, "python")
]


@pytest.mark.parametrize("block", PYTHON)
def test_python_blocks_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "<document>", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("command", PARSED)
def test_commands_that_are_not_run_parse(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    app_command = get_command(app)
    arguments = with_config_file(app_command, spread_values(command.arguments)).arguments
    while hasattr(app_command, "commands"):
        app_command, arguments = app_command.commands[arguments[0]], arguments[1:]
    app_command.make_context("fishr", arguments)


def rows_of(folder: Path, pictures: Path) -> list[str]:
    """A manifest's row for each picture."""
    paths = [path.relative_to(folder) for path in sorted(pictures.rglob("*.png"))]
    return [f"{path},{path.parent.name},{path.parent.parent.name}" for path in paths]


def write_manifest(path: Path, rows: list[str]) -> None:
    path.write_text("\n".join(["path,label,domain", *rows]) + "\n")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader's folder holds: the repository's own, images, a manifest of them, and weights of a network."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("benchmarks", "examples"):
        (folder / name).symlink_to(ROOT / name)
    pictures = write_pictures(folder / "pictures", DOMAINS, CLASSES, each=5)
    write_manifest(folder / "pictures.csv", rows_of(folder, pictures))
    (folder / "new").mkdir()
    for name in ("dog", "guitar", "horse", "person"):
        picture(f"new {name}").save(folder / "new" / f"{name}.jpg")
    (folder / "new" / "truncated.jpg").write_bytes((folder / "new" / "dog.jpg").read_bytes()[:-200])
    network = timm.create_model("mobilenetv2_100")
    save_file(network.state_dict(), folder / "imagenet.safetensors")
    return folder


@pytest.fixture
def place(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same with caches of its own, in which the hub's weights are that the pages use; the current folder."""
    for path in clone.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FISHR_CACHE", str(clone / ".cache"))
    weights = tmp_path / ".hub" / "models--timm--mobilenetv2_100.ra_in1k"
    (weights / "refs").mkdir(parents=True)
    (weights / "refs" / "main").write_text("0" * 40)
    (weights / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (weights / "snapshots" / ("0" * 40) / "model.safetensors").symlink_to(clone / "imagenet.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / ".hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    close_session()
    keep_trackers_local(monkeypatch, tmp_path / ".trackers")
    yield tmp_path
    close_session()


@pytest.mark.filterwarnings(NOLOAD)
@pytest.mark.parametrize("page", [page for page, commands in COMMANDS.items() if commands])
def test_commands_run(page: str, place: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    other, beginning = TAKEN_FOR_GRANTED.get(page, (page, "nothing"))
    run = [command for command in COMMANDS[other] if command.text.startswith(beginning)] + COMMANDS[page]
    run = [command for command in run if not command.begins(NOT_RUN)]
    if any("mnist" in command.text for command in run):
        monkeypatch.setenv("FISHR_DATA", str(request.getfixturevalue("data_root")))
    if any("--figures" in command.text for command in run):
        request.getfixturevalue("browser")
    for command in run:
        if command.text.startswith("export "):
            monkeypatch.setenv(*command.text.removeprefix("export ").split("=", 1))
            continue
        assert command.text.startswith("fishr "), f"{command}: say in NOT_RUN why it is not run"
        smaller = shlex.split(" ".join(command.begins(SMALLER)))
        assert main([*command.arguments, *smaller]) == 0, command


@pytest.mark.parametrize("message", GOES_WRONG)
def test_messages_that_are_explained_are_said(message: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"`{message}`\n:   " in PAGES["docs/your-images.md"]
    rows = rows_of(place, place / "pictures")
    write_manifest(place / "damaged.csv", [*rows, "new/truncated.jpg,dog,photo"])
    write_manifest(place / "gaps.csv", [row for row in rows if ",person,sketch" not in row and ",dog," not in row])
    for command in GOES_WRONG[message]:
        main(shlex.split(command))
    assert message in capsys.readouterr().err


def test_messages_that_are_explained_are_all_tested() -> None:
    _, _, section = PAGES["docs/your-images.md"].partition("## When something goes wrong")
    assert re.findall(r"^`(.+)`$", section, re.MULTILINE) == list(GOES_WRONG)


def test_a_run_leaves_what_is_listed(place: Path) -> None:
    assert main(shlex.split(f"train --data pictures --test-domain sketch --output runs/pictures {SMALL}")) == 0
    _, _, section = PAGES["docs/your-images.md"].partition("### What comes out")
    _, listing = next(blocks(section, "text"))
    listed = [line.split()[0].rstrip("/") for line in listing.splitlines()]
    assert sorted(listed) == sorted(["runs/pictures", *(path.name for path in Path("runs/pictures").rglob("*"))])


def test_there_is_something_to_check() -> None:
    assert PYTHON
    assert {"README.md", "docs/index.md", "docs/your-images.md", "docs/algorithms/fishr.md"} <= COMMANDS.keys()


@pytest.mark.parametrize("table", [SMALLER, NOT_RUN], ids=["SMALLER", "NOT_RUN"])
def test_what_is_said_of_commands_concerns_some(table: dict[str, str]) -> None:
    for beginning in table:
        assert any(command.text.startswith(beginning) for page in COMMANDS.values() for command in page), beginning
