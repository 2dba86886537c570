"""What the documents show runs: Python blocks are executed, ``fishr`` commands are parsed."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from fishr.cli.app import app, spread_values
from fishr.cli.config_file import with_config_file

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list:
    found = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text[: match.start()].count("\n") + 1
            found.append(pytest.param(match[1], id=f"{document.name}:{line}"))
    return found


def commands() -> list:
    lines = [line for block in blocks("bash") for line in block.values[0].replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("fishr ")]


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "<document>", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_commands_parse(arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = get_command(app)
    arguments = with_config_file(command, spread_values(arguments)).arguments
    while hasattr(command, "commands"):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    command.make_context("fishr", arguments)


def test_there_is_something_to_check():
    assert blocks("python")
    assert commands()
