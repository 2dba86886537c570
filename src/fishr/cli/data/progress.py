"""What is drawn of downloads and of the writing of images."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from fishr.cli.console import stderr


class Watchers(NamedTuple):
    """Functions that draw how far a file's download, and the writing of images, have come; None to draw nothing."""

    on_bytes: Callable[[str, int, int | None], None] | None
    on_files: Callable[[str, int, int | None], None] | None


class _AmountColumn(ProgressColumn):
    """Bytes of a download, or numbers of images."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.files = DownloadColumn(), MofNCompleteColumn()

    def render(self, task: Task) -> Text:
        return (self.bytes if task.fields["in_bytes"] else self.files).render(task)


@contextmanager
def watchers(*, quiet: bool) -> Iterator[Watchers]:
    """Draw a bar for each file and each archive on stderr, if that is a terminal."""
    if quiet or not stderr.is_terminal:
        yield Watchers(None, None)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        _AmountColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=stderr) as progress:
        tasks: dict[str, TaskID] = {}

        def draw(what: str, done: int, total: int | None, *, in_bytes: bool) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total, in_bytes=in_bytes)
            progress.update(tasks[what], completed=done, total=total)

        yield Watchers(
            lambda what, done, total: draw(what, done, total, in_bytes=True),
            lambda what, done, total: draw(what, done, total, in_bytes=False),
        )
