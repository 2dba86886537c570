"""The HTML report that commands leave in their folder."""

import json
import platform
import shlex
from contextvars import ContextVar
from importlib.metadata import version
from pathlib import Path

from fishr.cli.console import print_line, print_notice
from fishr.errors import FishrError
from fishr.files import write_text
from fishr.records import MADE_BY_FILE

command_line: ContextVar[tuple[str, ...]] = ContextVar("command_line")
"""The arguments of the command that runs."""


def leave_report(folder: Path, *, made: bool, quiet: bool = False) -> None:
    """Write what made the folder, and its report, and print where that is.

    The work is done by then: a report that cannot be written is no error.

    Args:
        folder: The folder.
        made: Whether this command made runs; else who made it before is left as it is.
        quiet: Print nothing.
    """
    from fishr.reports.page import REPORT, write_report

    made_by = {
        "command": shlex.join(("fishr", *command_line.get())),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("fishr", "torch")}},
    }
    try:
        if made:
            write_text(folder / MADE_BY_FILE, json.dumps(made_by, indent=2) + "\n")
        write_report(folder / REPORT, [folder])
    except (OSError, FishrError) as error:
        print_notice(f"warning: the report in {folder} could not be written: {error}")
        return
    if not quiet:
        print_line(f"Report: {folder / REPORT}")
