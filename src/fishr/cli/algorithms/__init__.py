"""``fishr algorithms``: what they are and what they take."""

import typer

from fishr.cli.algorithms.list import list_algorithms
from fishr.cli.algorithms.show import show

algorithms_app = typer.Typer(no_args_is_help=True, help="The algorithms: what they are and what they take.")
algorithms_app.command("list")(list_algorithms)
algorithms_app.command()(show)
