"""``--config``: a YAML file that gives options of a command by their names; what the command line gives wins."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
import yaml

from fishr.errors import ConfigError
from fishr.registry import unknown

NAME, KEY_VALUE = "--config", "KEY=VALUE"

ConfigFile = typer.Option(
    None, NAME, metavar="FILE", help="YAML with options by their names, e.g. steps: 1000; the command line wins."
)
"""Declares the option; :func:`with_config_file` puts what the file says in its place."""


@dataclass(frozen=True)
class Expanded:
    """Arguments with a config file's in their place.

    Attributes:
        arguments: The arguments.
        places: Where the file gives what: keys below others (``lr`` below ``set``), options (``--steps``) and texts
            (``'erm'``, in quotes), each with its place, ``"sweep.yaml, line 3"``.
    """

    arguments: list[str]
    places: Mapping[str, str]

    def explained(self, message: str) -> str:
        """An error about something that the file gives, with its place there."""
        words = re.findall(r"[\w-]+", message)
        options = [word if word.startswith("--") else f"--{word.replace('_', '-')}" for word in words]
        for said in (*words, *options, *re.findall(r"'[^']+'", message)):
            if said in self.places:
                return f"{self.places[said]}: {message}"
        return message


def with_config_file(command: Any, arguments: Sequence[str]) -> Expanded:
    """The arguments with the options of ``--config FILE``, but for those that the command line gives too.

    Args:
        command: The application, as typer made it.
        arguments: As :data:`sys.argv` has them, several values as repeated options.

    Raises:
        ConfigError: the file cannot be read, or has a key that is no option, or a value of the wrong kind.
    """
    depth = 0
    while depth < len(arguments) and arguments[depth] in getattr(command, "commands", {}):
        command = command.commands[arguments[depth]]
        depth += 1
    options = {option: parameter for parameter in command.params for option in parameter.opts}
    rest = [part for argument in arguments[depth:] for part in _split(argument)]
    if NAME not in options or NAME not in rest[:-1]:
        return Expanded(list(arguments), {})
    at = rest.index(NAME)
    file = Path(rest[at + 1])
    del rest[at : at + 2]
    if NAME in rest:
        raise ConfigError(f"{NAME} is given twice")
    given: list[str] = []
    places: dict[str, str] = {}
    seen: set[str] = set()
    for line, key, value, keys_below in _entries(file):
        option, place = f"--{key.replace('_', '-')}", f"{file}, line {line}"
        if option not in options or option in (NAME, "--help"):
            names = [name.removeprefix("--") for name in options if name.startswith("--")]
            raise ConfigError(f"{place}: {unknown('key', key, set(names) - {'config', 'help'})}")
        if option in seen:
            raise ConfigError(f"{place}: {key} is given twice")
        seen.add(option)
        if not any(argument.partition("=")[0] == option for argument in rest):
            places[option] = place
            places |= {repr(text): place for text in (value if isinstance(value, list) else [value])}
            places |= {below: f"{file}, line {line_below}" for below, line_below in keys_below.items()}
            try:
                given += _as_arguments(option, options[option], value)
            except ValueError as error:
                raise ConfigError(f"{place}: {key} {error}, got {json.dumps(value, default=str)}") from None
    return Expanded([*arguments[:depth], *given, *rest], places)


def _split(argument: str) -> list[str]:
    """``--config=FILE`` as its two parts."""
    return argument.split("=", 1) if argument.startswith(f"{NAME}=") else [argument]


def _entries(file: Path) -> Iterator[tuple[int, str, Any, dict[str, int]]]:
    """Line, key and value of each entry, and the lines of the keys below it."""
    try:
        loader = yaml.SafeLoader(file.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is None:
            return
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{file}, line {root.start_mark.line + 1}: expected lines such as steps: 1000")
        for key, value in root.value:
            below = value.value if isinstance(value, yaml.MappingNode) else []
            keys_below = {str(name.value): name.start_mark.line + 1 for name, _ in below}
            yield key.start_mark.line + 1, str(key.value), loader.construct_object(value, deep=True), keys_below
    except FileNotFoundError:
        raise ConfigError(f"there is no file {file}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{file}, line {line}: {error.problem}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} is no YAML: {error}") from None


def _as_arguments(option: str, parameter: Any, value: Any) -> list[str]:
    """What one would type on the command line.

    Raises:
        ValueError: a value that the option cannot take; says what it takes.
    """
    if value is None:
        return []
    if parameter.is_flag:
        if not isinstance(value, bool):
            raise ValueError("must be true or false")
        return [option] if value else []
    if parameter.metavar == KEY_VALUE:
        if not isinstance(value, Mapping):
            raise ValueError("must be lines of the form name: value")
        value = [f"{name}={each if isinstance(each, str) else json.dumps(each)}" for name, each in value.items()]
    values = value if parameter.multiple and isinstance(value, list) else [value]
    if not all(isinstance(each, str | int | float) and not isinstance(each, bool) for each in values):
        raise ValueError(f"must be {'one value, or a list of them' if parameter.multiple else 'one value'}")
    return [argument for each in values for argument in (option, str(each))]
