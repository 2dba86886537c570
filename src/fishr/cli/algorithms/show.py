"""``fishr algorithms show``."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import typer

from fishr.cli.console import Json, print_json, print_line


def show(
    name: str = typer.Argument(..., help="Its name, or package.module:Class."),
    as_json: bool = Json,
) -> None:
    """One algorithm: objective, hyperparameters, cost of a step as it was measured, reference.

    Examples:

        fishr algorithms show fishr

        fishr algorithms show vrex --json
    """
    from fishr.algorithms.base import NOTATION
    from fishr.algorithms.describe import describe

    described = describe(name)
    if as_json:
        print_json(asdict(described))
        return
    print_line(f"{described.title} ({described.year}): {described.idea}")
    print_line("")
    print_line(described.text)
    print_line("")
    print_line(NOTATION)
    print_line("")
    for each in described.hyperparameters:
        own = "" if each.recommended == each.defaults else f" ({_by_kind(each.recommended)} on data of your own)"
        print_line(f"{each.name} = {_by_kind(each.defaults)}{own}")
        print_line(f"    {each.meaning}")
        if each.spaces:
            print_line(f"    Searched: {_by_kind(each.spaces)}")
    print_line("")
    for case, cost in described.step_costs.items():
        print_line(f"A step takes about {cost:.1f} times as long as ERM's ({case}).")
    print_line(f"Reference: {described.reference}")


def _by_kind(values: Mapping[str, Any]) -> str:
    """One value where all kinds of data have the same, else each with its kinds."""
    kinds: dict[str, list[str]] = {}
    for kind, value in values.items():
        kinds.setdefault(_text(value), []).append(kind.replace("_", " "))
    if len(kinds) == 1:
        return next(iter(kinds))
    return "; ".join(f"{value} for {' and '.join(of_value)}" for value, of_value in kinds.items())


def _text(value: object) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)  # as --set reads it
    return f"{value:.4g}" if isinstance(value, float) else str(value)
