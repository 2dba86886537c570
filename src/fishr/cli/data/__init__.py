"""``fishr data``."""

import typer

from fishr.cli.data.check import check
from fishr.cli.data.download import download
from fishr.cli.data.list import list_datasets
from fishr.cli.data.prepare import prepare

data_app = typer.Typer(no_args_is_help=True, help="List, get and check datasets.")
data_app.command("list")(list_datasets)
data_app.command()(check)
data_app.command()(prepare)
data_app.command()(download)
