"""The typer application: its commands, and how it is called."""

import re
from collections.abc import Sequence

import typer
from typer.main import get_command

from fishr.cli.algorithms import algorithms_app
from fishr.cli.analyze import analyze
from fishr.cli.compare import compare
from fishr.cli.config_file import with_config_file
from fishr.cli.console import print_error, print_notice
from fishr.cli.data import data_app
from fishr.cli.demo import demo
from fishr.cli.evaluate import evaluate
from fishr.cli.export import export
from fishr.cli.page import command_line
from fishr.cli.predict import predict
from fishr.cli.report import report
from fishr.cli.reproduce import reproduce_app
from fishr.cli.sweep import sweep_app
from fishr.cli.train import train
from fishr.errors import ConfigError

MULTIPLE = (
    "--algorithms",
    "--average-arg",
    "--backbone-arg",
    "--datasets",
    "--figures",
    "--images",
    "--layers",
    "--mean",
    "--methods",
    "--set",
    "--std",
    "--test-domain",
)
"""Options that take several values, ``--methods erm fishr``, which typer knows only as repeated options."""
OPTION = re.compile(r"--|-[a-z]$")

INTERRUPTED = 130
"""What typer makes of ^C, where a command does not handle it."""

app = typer.Typer(
    name="fishr",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Train classifiers that hold up on data from a place they have never seen.",
)
app.command()(demo)
app.command()(train)
app.command()(compare)
app.command()(evaluate)
app.command()(export)
app.command()(predict)
app.command()(report)
app.command()(analyze)
app.add_typer(algorithms_app, name="algorithms")
app.add_typer(data_app, name="data")
app.add_typer(reproduce_app, name="reproduce")
app.add_typer(sweep_app, name="sweep")


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version and leave.")) -> None:
    if version:
        from fishr import __version__

        typer.echo(f"fishr {__version__}")
        raise typer.Exit


def call(arguments: Sequence[str]) -> int:
    """Run a command with its arguments; usage errors are one line and exit code 2."""
    command_line.set(tuple(arguments))
    command = get_command(app)
    expanded = with_config_file(command, arguments)
    try:
        code = command.main(args=expanded.arguments, prog_name="fishr", standalone_mode=False)
    except typer.Abort:
        code = INTERRUPTED
    except ConfigError as error:
        raise ConfigError(expanded.explained(str(error))) from None
    except Exception as error:
        # Typer's usage errors: their classes are not public in all versions, these two attributes are.
        if not hasattr(error, "format_message") or not hasattr(error, "exit_code"):
            raise
        message = error.format_message()
        if message:  # without one, the help was asked for and printed
            print_error(expanded.explained(message))
        return 2 if message else 0
    if code == INTERRUPTED:
        print_notice("interrupted")
    return code if isinstance(code, int) else 0


def spread_values(arguments: Sequence[str]) -> list[str]:
    """``--methods erm fishr`` as ``--methods erm --methods fishr``.

    >>> spread_values(["reproduce", "--methods", "erm", "fishr", "--restarts", "3"])
    ['reproduce', '--methods', 'erm', '--methods', 'fishr', '--restarts', '3']
    """
    spread: list[str] = []
    option = None
    for argument in arguments:
        if OPTION.match(argument):  # "-90%" is a domain
            option = argument if argument in MULTIPLE else None
            spread.append(argument)
        elif option and spread[-1] != option:
            spread += [option, argument]
        else:
            spread.append(argument)
    return spread
