"""``fishr sweep stop`` and ``fishr sweep retry``."""

from pathlib import Path

import typer

from fishr.cli.console import print_line
from fishr.sweeps.folder import SweepFolder

Folder = typer.Argument(..., metavar="FOLDER", help="Folder of the sweep.")


def stop(folder: Path = Folder) -> None:
    """Ask all who work on a sweep, on this machine or others, to save their runs and leave.

    Examples:

        fishr sweep stop runs/sweep
    """
    sweep = SweepFolder(folder)
    sweep.settings()
    sweep.ask_to_stop()
    print_line(f"Asked to stop; fishr sweep run with the same options and --output {folder} continues.")


def retry(folder: Path = Folder) -> None:
    """Forget the failures of a sweep, so that its next call makes these runs again.

    Examples:

        fishr sweep retry runs/sweep
    """
    sweep = SweepFolder(folder)
    sweep.settings()
    forgotten = sweep.retry()
    if not forgotten:
        print_line("No run has failed.")
        return
    print_line(
        f"Failures forgotten: {len(forgotten)}; fishr sweep run with the same options and --output {folder} makes "
        "these runs again."
    )
