"""What the command line draws: errors, warnings, progress, tables. Results go to stdout, everything else to stderr."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fishr.records import RunRecord
    from fishr.training import Observer, RunConfig
    from fishr.workflows.colored import MethodRun

Json = typer.Option(False, "--json", help="Print the result as JSON on stdout.")
Quiet = typer.Option(False, "--quiet", "-q", help="Show no progress, only the result.")
Device = typer.Option("auto", "--device", help="auto, cpu, cuda or mps.")
DataRoot = typer.Option(
    None, "--data-root", help="Folder of the datasets; default $FISHR_DATA, else the user's cache folder."
)

stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False)


def print_notice(message: str) -> None:
    """One line on stderr."""
    stderr.print(f"fishr: {' '.join(message.split())}", markup=False, soft_wrap=True)


def print_error(message: str) -> None:
    """One line on stderr that says it is an error."""
    print_notice(f"error: {message}")


def warnings_to_stderr() -> None:
    """Show the library's warnings, one line each."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            print_notice(f"{record.levelname.lower()}: {record.getMessage()}")

    logger = logging.getLogger("fishr")
    logger.handlers = [Handler()]
    logger.propagate = False


def print_json(content: Mapping[str, Any]) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(content, indent=2))


def print_line(text: str) -> None:
    """Text on stdout as it is, not broken into lines."""
    stdout.print(text, markup=False, soft_wrap=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> None:
    """A table on stdout, its first ``left`` columns text and the others numbers."""
    stdout.print(table_of(header, rows, left))


def table_of(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> Table:
    """A table to draw, its first ``left`` columns text and the others numbers."""
    table = Table()
    for index, name in enumerate(header):
        table.add_column(Text(name), justify="left" if index < left else "right")
    for row in rows:
        table.add_row(*map(Text, row))  # what users call their folders is no markup
    return table


class ProgressBar:
    """An observer that draws a run: steps, loss terms, time left."""

    def __init__(self, progress: Progress, title: str) -> None:
        self.progress, self.title = progress, title
        self.images: TaskID | None = None
        self.task: TaskID | None = None

    def on_images(self, done: int, total: int) -> None:
        if self.images is None:
            self.images = self.progress.add_task("decoding images", losses="")
        self.progress.update(self.images, completed=done, total=total)

    def on_start(self, config: "RunConfig", step: int) -> None:
        self.task = self.progress.add_task(self.title, total=config.steps, completed=step, losses="")

    def on_step(self, step: int, losses: Mapping[str, float]) -> None:
        if self.task is not None:
            shown = "  ".join(f"{name} {value:.3g}" for name, value in losses.items())
            self.progress.update(self.task, completed=step, losses=shown)

    def on_record(self, record: "RunRecord") -> None: ...

    def remove(self) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)


def run_progress(console: Console, *, disable: bool = False) -> Progress:
    """Bars with steps and time left; runs of trainings add theirs to it."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[losses]}"),
        console=console,
        disable=disable,
    )


@contextmanager
def progress_of_run(title: str, *, quiet: bool) -> Iterator["Observer | None"]:
    """An observer for one run, or None when nothing is to be shown."""
    if quiet or not stderr.is_terminal:
        yield None
        return
    with run_progress(stderr) as progress:
        yield ProgressBar(progress, title)


class LiveRuns:
    """A watcher that draws the table of finished runs and the progress of the current one.

    Where stderr is no terminal it prints a line for each finished run instead.
    """

    HEADER = ("method", "seed", "train", "unseen", "gray")

    def __init__(self, titles: Mapping[str, str], *, num_runs: int, quiet: bool) -> None:
        self.titles, self.num_runs, self.quiet = titles, num_runs, quiet
        self.rows: list[tuple[str, ...]] = []
        self.begun, self.trained = 0, 0
        self.progress = run_progress(stderr)
        self.live = Live(console=stderr, refresh_per_second=8)
        self.drawn = stderr.is_terminal and not quiet

    def __enter__(self) -> "LiveRuns":
        if self.drawn:
            self.live.start()
            self._draw()
        return self

    def __exit__(self, *_: object) -> None:
        if self.drawn:
            self.live.update(table_of(self.HEADER, self.rows) if self.rows else "")
            self.live.stop()

    @contextmanager
    def run(self, method: str, seed: int) -> Iterator["Observer"]:
        self.begun += 1
        title = f"{self.begun}/{self.num_runs} {self.titles[method]}, seed {seed}"
        bar = ProgressBar(self.progress, title)
        yield bar
        self.trained += bar.task is not None
        bar.remove()

    def on_result(self, run: "MethodRun") -> None:
        row = (self.titles[run.algorithm], str(run.seed), *(f"{value:.1f}" for value in run.accuracies))
        self.rows.append(row)
        if self.drawn:
            self._draw()
        elif not self.quiet:
            stderr.print("  ".join(f"{name} {cell}" for name, cell in zip(self.HEADER, row, strict=True)), markup=False)

    def _draw(self) -> None:
        self.live.update(Group(table_of(self.HEADER, self.rows), self.progress))


def print_if_done_before(watcher: LiveRuns, output: Path) -> None:
    """Say so when no run had to be made."""
    if watcher.trained == 0:
        print_line(f"All runs were done before; to make them anew, delete {output}.")
