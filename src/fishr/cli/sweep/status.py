"""``fishr sweep status``."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fishr.cli.console import Json, print_json, stdout, table_of
from fishr.cli.sweep.control import Folder
from fishr.reports.tables import one_line
from fishr.sweeps.folder import Progress, State, SweepFolder
from fishr.workflows.plan import duration

REFRESH_SECONDS = 2.0
STATES: tuple[State, ...] = ("done", "running", "waiting", "failed")
MOST_SHOWN = 20
"""Running and failed runs, each."""


def status(
    folder: Path = Folder,
    live: bool = typer.Option(False, "--live", help="Go on showing it, until all runs are done or ^C."),
    as_json: bool = Json,
) -> None:
    """How far a sweep is: runs by dataset and algorithm, those at work with the time left, failures with the reason.

    Examples:

        fishr sweep status runs/sweep --live
    """
    sweep = SweepFolder(folder)
    sweep.settings()
    progress = sweep.progress()
    if as_json:
        print_json({"runs": [asdict(each) for each in progress]})
        return
    if not live:
        stdout.print(_shown(progress))
        return
    with Live(_shown(progress), console=stdout, auto_refresh=False, vertical_overflow="visible") as screen:
        while any(each.state in ("waiting", "running") for each in progress):
            time.sleep(REFRESH_SECONDS)
            progress = sweep.progress()
            screen.update(_shown(progress), refresh=True)


def _shown(progress: Sequence[Progress]) -> Group:
    """What there is to say, for a terminal."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for each in progress:
        counts.setdefault((each.job.data, each.job.algorithm), Counter())[each.state] += 1
    rows = [(*of, *(f"{count[state]:,}" for state in STATES)) for of, count in counts.items()]
    parts: list[Table | Text] = [table_of(("dataset", "algorithm", *STATES), rows, left=2)]

    running = [each for each in progress if each.state == "running"]
    if running:
        header = ("running", "step", "of", "time left")
        cells = [
            (one_line(each.job.title), f"{each.step:,}", f"{each.steps or 0:,}", _time_left(each)) for each in running
        ]
        parts.append(table_of(header, cells[:MOST_SHOWN]))
    failed = [each for each in progress if each.state == "failed"]
    damaged = [each for each in progress if each.reason and each.state != "failed"]
    for name, runs in (("failed", failed), ("damaged", damaged)):
        if runs:
            reasons = [(one_line(each.job.title), one_line(each.reason)) for each in runs]
            parts.append(table_of((name, "reason"), reasons[:MOST_SHOWN], left=2))
    for name, runs in (("running", running), ("failed", failed), ("damaged", damaged)):
        if len(runs) > MOST_SHOWN:
            parts.append(Text(f"{len(runs) - MOST_SHOWN:,} more runs are {name}; --json names all."))
    done = sum(each.state == "done" for each in progress)
    parts.append(Text(f"{done:,} of {len(progress):,} runs are done."))
    return Group(*parts)


def _time_left(progress: Progress) -> str:
    return "" if progress.seconds_left is None else duration(progress.seconds_left)
