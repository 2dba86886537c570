"""``fishr predict``."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fishr.cli.console import Device, Quiet, print_error, print_notice, stderr
from fishr.errors import ConfigError, RunInterruptedError

if TYPE_CHECKING:
    from fishr.deploy.predict import Prediction


def predict(
    model: Path = typer.Argument(..., metavar="MODEL", help="Folder of a model, or of a finished run."),
    paths: list[Path] = typer.Argument(..., metavar="PATH", help="Image files, and folders with images in them."),
    output: Path | None = typer.Option(
        None, "--output", help="File to write, .csv, .jsonl or .parquet; default CSV on stdout."
    ),
    top_k: int = typer.Option(1, "--top-k", help="Most probable classes in a row."),
    abstain_below: float | None = typer.Option(
        None,
        "--abstain-below",
        help="Add the column abstain: true where the label is less probable than this, or missing.",
    ),
    batch_size: int = typer.Option(64, "--batch-size", help="Images that go through the network together."),
    device: str = Device,
    as_json: bool = typer.Option(False, "--json", help="Print rows as JSON lines, not as CSV."),
    quiet: bool = Quiet,
) -> int:
    """Predict the classes of images: a row with path, label and probability for each, in any number.

    Folders are searched to the bottom for images. One that cannot be read has the reason in the column error, and the
    rest is predicted. Labels are filled in where a row abstains: look at the column abstain before you use them.

    Examples:

        fishr predict runs/first photo.jpg

        fishr predict runs/first scans/2024 scans/2025 --output predictions.parquet --abstain-below 0.9

        fishr predict runs/first scans --top-k 3 --json > predictions.jsonl
    """
    from fishr.deploy.predict import find_images, predict_images
    from fishr.deploy.prediction_file import Columns, PredictionFile, PredictionLines
    from fishr.models import load_model
    from fishr.training.signals import stop_on_signal

    if output is not None:
        if as_json:
            raise ConfigError("--json is for rows on stdout; for JSON lines in a file, let its name end in .jsonl")
        PredictionFile.check_path(output)
    images = find_images(paths)
    loaded = load_model(model)
    if loaded.card.depends_on_batch:
        print_notice(
            "warning: the model adapts to the domain of a batch: predict images of one domain at a time, and expect "
            f"other answers with another --batch-size than {batch_size}"
        )
    predictions = predict_images(
        loaded, images, top_k=top_k, abstain_below=abstain_below, batch_size=batch_size, device=device
    )
    columns = Columns(top_k, abstain=abstain_below is not None)
    rows: AbstractContextManager[PredictionLines | PredictionFile]
    if output is None:
        rows = nullcontext(PredictionLines(sys.stdout.buffer, columns, "jsonl" if as_json else "csv"))
    else:
        rows = PredictionFile(output, columns)
    tally = _Tally()
    drawn = output is not None and not quiet and stderr.is_terminal
    with stop_on_signal() as stop, rows as table, closing(predictions), _progress(drawn=drawn) as one_more:
        for prediction in predictions:
            if stop.signal_number is not None:
                kept = f": {table.keep()}" if isinstance(table, PredictionFile) else ""
                raise RunInterruptedError(f"stopped after {_images(tally.rows)}{kept}", stop.signal_number)
            table.write(prediction)
            tally.add(prediction)
            one_more()
    message = tally.message(abstain_below is not None) + (f"; written to {output}" if output else "")
    if tally.unreadable == tally.rows:
        print_error(message)
        return 2
    if tally.unreadable or not quiet:
        print_notice(message)
    return 0


@dataclass
class _Tally:
    """Counts of rows."""

    rows: int = 0
    unreadable: int = 0
    first_unreadable: str = ""
    abstained: int = 0

    def add(self, prediction: "Prediction") -> None:
        self.rows += 1
        if prediction.error is None:
            self.abstained += prediction.abstain
        else:
            self.unreadable += 1
            self.first_unreadable = self.first_unreadable or f"{prediction.printable_path}: {prediction.error}"

    def message(self, abstaining: bool) -> str:
        parts = [f"{_images(self.rows - self.unreadable)} predicted"]
        if self.unreadable:
            parts.append(f"{self.unreadable:,} could not be read (first: {self.first_unreadable})")
        if abstaining:
            parts.append(f"{self.abstained:,} abstained")
        return ", ".join(parts)


def _images(number: int) -> str:
    return f"{number:,} {'image' if number == 1 else 'images'}"


@contextmanager
def _progress(*, drawn: bool) -> Iterator[Callable[[], None]]:
    """A function that counts one more image in a line on stderr, or does nothing."""
    if not drawn:
        yield lambda: None
        return
    columns = SpinnerColumn(), TextColumn("{task.completed:,} images predicted"), TimeElapsedColumn()
    with Progress(*columns, console=stderr) as progress:
        task = progress.add_task("")
        yield lambda: progress.advance(task)
