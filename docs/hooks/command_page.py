"""The page of the command line, made of what ``--help`` shows."""

import inspect
from collections.abc import Iterator
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from typer.main import get_command

from fishr.cli.app import app
from repository_paths import generated

ADDRESS = "commands.md"

INTRODUCTION = """# Command line

Every command has `--help`. Options that take several values take them one after the other, `--set lr=1e-4 dropout=0.1`,
or are given several times. Errors are one line, with exit code 2; a command that was stopped by signal N ends with
128 + N."""


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the page to the site."""
    files.append(generated(config, ADDRESS, page()))


def page() -> str:
    """All commands, each with what it does, examples, and its options."""
    return "\n\n".join([INTRODUCTION, *(section(*each) for each in commands("fishr", get_command(app)))])


def commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """The commands of a group, those of the groups in it too, with their full names."""
    if not hasattr(command, "commands"):
        yield name, command
        return
    for below, each in command.commands.items():
        yield from commands(f"{name} {below}", each)


def section(name: str, command: Any) -> str:
    """One command."""
    text, _, examples = inspect.cleandoc(command.help).partition("Examples:\n")
    shown = "\n".join(line.strip() for line in examples.splitlines() if line.strip())
    parameters = "\n\n".join(definition(each) for each in command.params)
    return f"## {name}\n\n{text}\n\n```bash\n{shown}\n```\n\n{parameters}"


def definition(parameter: Any) -> str:
    """An argument or an option, what it is, and its default."""
    is_option = parameter.param_type_name == "option"
    names = parameter.opts if is_option else [parameter.metavar or parameter.name.upper()]
    value = f" {parameter.metavar}" if is_option and parameter.metavar else ""
    texts = [parameter.help.rstrip(".") + "."]
    if parameter.required and is_option:
        texts.append("Required.")
    if parameter.default not in (None, False, [], ...):
        default = parameter.default
        texts.append(f"Default: `{' '.join(map(str, default)) if isinstance(default, list | tuple) else default}`.")
    return f"{', '.join(f'`{each}{value}`' for each in names)}\n:   {' '.join(texts)}"
