"""``fishr report``."""

from pathlib import Path

import typer

from fishr.cli.console import Quiet, print_line, print_notice, run_progress, stderr
from fishr.errors import RunError
from fishr.registry import unknown


def report(
    paths: list[Path] = typer.Argument(..., metavar="PATH...", help="Folders of runs, or with runs in them."),
    selection: str = typer.Option(
        "training", "--selection", help="How checkpoint and draw are chosen: training, leave-one-out, oracle or all."
    ),
    output_format: str = typer.Option("text", "--format", help="text, markdown, latex, csv or json."),
    fixed_config: bool = typer.Option(
        False,
        "--fixed-config",
        help="Only draw 0, whose hyperparameters all trials share: errors are over seeds alone.",
    ),
    quiet: bool = Quiet,
) -> None:
    """Tables of a sweep's results, or of DomainBed's output folders, or of both together.

    An index in each PATH (.fishr-index.arrow) keeps what was read; only runs that changed are read again.

    Examples:

        fishr report runs/sweep --selection all

        fishr report runs/sweep domainbed/output --format latex
    """
    from fishr.reports.benchmark import results
    from fishr.reports.render import FORMATS
    from fishr.reports.run_folders import read_histories
    from fishr.selection import RULES

    if selection not in (*RULES, "all"):
        raise unknown("selection rule", selection, (*RULES, "all"))
    if output_format not in FORMATS:
        raise unknown("format", output_format, FORMATS)
    with run_progress(stderr, disable=quiet or not stderr.is_terminal) as progress:
        task = progress.add_task("reading runs", losses="")
        found = read_histories(paths, lambda done, total: progress.update(task, completed=done, total=total))
    folders: dict[str, list[str]] = {}
    for folder, reason in found.problems.items():
        folders.setdefault(reason, []).append(folder)
    for reason, of_reason in folders.items():
        print_notice(f"warning: {len(of_reason)} of the folders left out, {of_reason[0]} the first: {reason}")
    histories = [history for history in found.histories if history.draw == 0 or not fixed_config]
    if not histories:
        raise RunError("there is nothing to report: no run" + (" of draw 0" if fixed_config else "") + " has a record")
    rules = RULES if selection == "all" else (selection,)
    print_line(FORMATS[output_format]([results(histories, rule) for rule in rules]).rstrip())
