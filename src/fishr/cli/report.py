"""``fishr report``."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fishr.cli.console import Quiet, print_line, print_notice, run_progress, stderr
from fishr.errors import ConfigError, RunError
from fishr.files import write_text
from fishr.registry import unknown

if TYPE_CHECKING:
    from fishr.reports.run_folders import Found, OnProgress


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
    best_configs: Path | None = typer.Option(
        None,
        "--best-configs",
        metavar="FOLDER",
        help="Write the best draw for each held-out domain as YAML, which fishr train --config takes.",
    ),
    html: Path | None = typer.Option(
        None, "--html", metavar="FILE", help="Write all that is to be seen as a page, one file that needs no network."
    ),
    serve: bool = typer.Option(
        False, "--serve", help="Serve that page on this machine alone until ^C; it follows the runs."
    ),
    port: int = typer.Option(8000, "--port", min=0, max=65535, help="Port of --serve; 0 for any that is free."),
    quiet: bool = Quiet,
) -> None:
    """Tables of a sweep's results, or of DomainBed's output folders, or of both together.

    An index in each PATH (.fishr-index.arrow) keeps what was read; only runs that changed are read again.

    Examples:

        fishr report runs/sweep --selection all

        fishr report runs/sweep domainbed/output --format latex

        fishr report runs/sweep --best-configs best

        fishr report runs/erm runs/fishr runs/analysis --html report.html

        fishr report runs/sweep --serve
    """
    from fishr.reports.benchmark import results
    from fishr.reports.best_configs import best_configs as configs_of
    from fishr.reports.render import FORMATS
    from fishr.reports.run_folders import read_histories
    from fishr.selection import RULES

    if selection not in (*RULES, "all"):
        raise unknown("selection rule", selection, (*RULES, "all"))
    if output_format not in FORMATS:
        raise unknown("format", output_format, FORMATS)
    if best_configs is not None and selection == "all":
        raise ConfigError("--best-configs needs one --selection")
    if html is not None or serve:
        if html is not None and serve:
            raise ConfigError("--html writes the page, --serve shows it: give one of them")
        if best_configs is not None or fixed_config or selection != "training" or output_format != "text":
            raise ConfigError(
                "the page holds all rules: --html and --serve go without --selection, --format, --fixed-config and "
                "--best-configs"
            )
        if html is not None:
            _write_page(html, paths, quiet=quiet)
        else:
            _serve(paths, port)
        return
    with _no_garbage_collection():
        with _reading(quiet=quiet) as on_progress:
            found = read_histories(paths, on_progress)
        _say_what_is_missing(paths, found)
        of_sweeps = [history for history in found.histories if history.swept]
        if count := len(found.histories) - len(of_sweeps):
            print_notice(f"{count:,} runs are of no sweep and left out of the tables: fishr report --html shows them")
        histories = [history for history in of_sweeps if history.draw == 0 or not fixed_config]
        if not histories:
            of_sweep = " of a sweep" if found.histories else ""
            of_draw = " of draw 0" if fixed_config else ""
            raise RunError(f"there is nothing to report: no run{of_sweep}{of_draw} has a record")
        if best_configs is not None:
            _write(best_configs, configs_of(histories, selection))
        rules = RULES if selection == "all" else (selection,)
        print_line(FORMATS[output_format](results(histories, *rules)).rstrip())


def _write_page(file: Path, paths: Sequence[Path], *, quiet: bool) -> None:
    from fishr.reports.page import write_report

    with _no_garbage_collection(), _reading(quiet=quiet) as on_progress:
        write_report(file, paths, on_progress)
    print_line(f"Report: {file}")


def _serve(paths: Sequence[Path], port: int) -> None:
    from fishr.reports.page.serve import Server

    with Server(paths, port) as server:
        print_line(f"Report: {server.address} (until ^C)")
        with suppress(KeyboardInterrupt):
            server.serve_forever()


@contextmanager
def _reading(*, quiet: bool) -> Iterator["OnProgress"]:
    """A bar of the folders that are read."""
    with run_progress(stderr, disable=quiet or not stderr.is_terminal) as progress:
        task = progress.add_task("reading runs", losses="")
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Of the millions of objects of a large sweep none is garbage, and to find that out takes a third of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _say_what_is_missing(paths: Sequence[Path], found: "Found") -> None:
    """Folders that count for nothing, and planned runs without a record."""
    from fishr.sweeps.folder import SweepFolder

    folders: dict[str, list[str]] = {}
    for folder, reason in found.problems.items():
        folders.setdefault(reason, []).append(folder)
    for reason, of_reason in folders.items():
        print_notice(f"warning: {len(of_reason)} of the folders left out, {of_reason[0]} the first: {reason}")
    for path in paths:
        planned = {job.run for job in SweepFolder(path).jobs()}
        missing = planned and planned.difference(Path(history.folder).name for history in found.histories)
        if missing:
            print_notice(f"{len(missing):,} of {len(planned):,} runs planned in {path} have no record yet")


def _write(folder: Path, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Each config as a YAML file."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    for name, options in configs.items():
        write_text(folder / f"{name}.yaml", yaml.safe_dump(dict(options), sort_keys=False))
    print_notice(f"{len(configs)} configs written to {folder}")
