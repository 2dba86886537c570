"""The HTML report that commands leave in their folder."""

import json
import platform
import shlex
from contextvars import ContextVar
from importlib.metadata import version
from pathlib import Path

from fishr.cli.console import print_line, print_notice
from fishr.files import write_text
from fishr.records import MADE_BY_FILE

command_line: ContextVar[tuple[str, ...]] = ContextVar("command_line")
"""The arguments of the command that runs."""


def leave_report(folder: Path, *, quiet: bool = False) -> None:
    """Write what made the folder, and its report; print where that is, unless ``quiet``.

    The work is done by then: a report that cannot be written is no error.
    """
    from fishr.reports.page import REPORT, write_report

    made_by = {
        "command": shlex.join(("fishr", *command_line.get())),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("fishr", "torch")}},
    }
    try:
        write_text(folder / MADE_BY_FILE, json.dumps(made_by, indent=2) + "\n")
        write_report(folder / REPORT, [folder])
    except OSError as error:
        print_notice(f"warning: the report in {folder} could not be written: {error.strerror or error}")
        return
    if not quiet:
        print_line(f"Report: {folder / REPORT}")
