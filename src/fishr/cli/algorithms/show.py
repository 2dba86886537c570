"""``fishr algorithms show``."""

from dataclasses import asdict

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
    from fishr.algorithms.describe import by_kind, describe

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
        own = "" if each.recommended == each.defaults else f" ({by_kind(each.recommended)} on data of your own)"
        print_line(f"{each.name} = {by_kind(each.defaults)}{own}")
        print_line(f"    {each.meaning}")
        if each.spaces:
            print_line(f"    Searched: {by_kind(each.spaces)}")
    print_line("")
    for case, cost in described.step_costs.items():
        print_line(f"A step takes about {cost:.1f} times as long as ERM's ({case}).")
    print_line(f"Reference: {described.reference}")
