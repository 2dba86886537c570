"""``fishr sweep``."""

import typer

from fishr.cli.sweep.control import retry, stop
from fishr.cli.sweep.run import run
from fishr.cli.sweep.status import status

sweep_app = typer.Typer(no_args_is_help=True, help="Many runs from one description, for a benchmark's tables.")
sweep_app.command()(run)
sweep_app.command()(status)
sweep_app.command()(stop)
sweep_app.command()(retry)
