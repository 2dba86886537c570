"""``fishr evaluate``."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fishr.cli.console import DataRoot, Device, Json, Quiet, print_json, print_line, print_table, stderr
from fishr.reports.tables import markdown_table

if TYPE_CHECKING:
    from fishr.deploy.evaluate import Evaluation, Scores

MOST_CLASSES = 20
"""Classes up to which all confusions are shown."""

LARGEST = 10
"""Confusions that are shown of more classes."""


def evaluate(
    model: Path = typer.Argument(..., metavar="MODEL", help="Folder of a model, or of a finished run."),
    data: str = typer.Argument(
        ...,
        metavar="DATA",
        help="A folder DOMAIN/CLASS/image, a manifest (CSV or Parquet), or a dataset's name.",
    ),
    subset: int | None = typer.Option(None, "--subset", help="Samples of each domain to use."),
    batch_size: int = typer.Option(64, "--batch-size", help="Samples that go through the network together."),
    data_root: Path | None = DataRoot,
    device: str = Device,
    as_json: bool = Json,
    quiet: bool = Quiet,
) -> None:
    """Accuracy, macro-F1, calibration error and confusions of a model on each domain of labelled data.

    Classes are matched by name. One domain is enough, such as a folder with images from a new place.

    Calibration error is the expected one, in 15 bins (Guo et al. 2017); macro-F1 is over the classes that occur.

    Examples:

        fishr evaluate runs/first my/images

        fishr evaluate runs/first new/images.csv --json > scores.json

        fishr evaluate runs/first pacs --data-root data
    """
    from fishr.deploy.evaluate import evaluate_model, load_data_for
    from fishr.models import load_model

    saved = load_model(model)
    dataset = load_data_for(saved.card, data, root=data_root, subset=subset)
    with _progress(drawn=stderr.is_terminal and not quiet) as progress:
        evaluation = evaluate_model(saved, dataset, device=device, batch_size=batch_size, progress=progress)
    if as_json:
        print_json({"model": str(model), "data": dataset.name, **_as_json(evaluation)})
    else:
        _print(evaluation)


def _as_json(evaluation: "Evaluation") -> dict[str, Any]:
    """All numbers of an evaluation, as JSON has them."""
    worst = evaluation.domains[evaluation.worst]
    return {
        "classes": list(evaluation.classes),
        "domains": {
            name: {
                "role": domain.role,
                "samples": domain.samples,
                **_scores(domain),
                "confusion": domain.confusion.tolist(),
            }
            for name, domain in evaluation.domains.items()
        },
        "mean": asdict(evaluation.mean),
        "worst": {"domain": evaluation.worst, **_scores(worst)},
        "confusion": evaluation.confusion.tolist(),
    }


def _scores(scores: "Scores") -> dict[str, float]:
    return {name: getattr(scores, name) for name in ("accuracy", "macro_f1", "calibration_error")}


def _print(evaluation: "Evaluation") -> None:
    domains, worst = evaluation.domains, evaluation.worst
    rows: list[tuple[str, ...]] = [
        (name, f"{domain.samples:,}", *_percent(domain), domain.role or "") for name, domain in domains.items()
    ]
    rows += [
        ("mean", "", *_percent(evaluation.mean), ""),
        (f"worst: {worst}", "", *_percent(domains[worst]), ""),
    ]
    columns = ["domain", "samples", "accuracy", "macro-F1", "calibration error"]
    if any(domain.role for domain in domains.values()):
        columns.append("in training")
    print_table(columns, [row[: len(columns)] for row in rows])
    print_line("In %. Mean: over domains, each counts the same. Worst: by accuracy. Macro-F1: over classes that occur.")
    trained_on = [name for name, domain in domains.items() if domain.role == "trained on"]
    if trained_on:
        print_line(
            f"The model was trained on samples of {', '.join(trained_on)}: what is measured there is no estimate for "
            "new ones."
        )
    confusion, classes = evaluation.confusion.tolist(), evaluation.classes
    if len(classes) <= MOST_CLASSES:
        print_line("\nConfusions in all domains (rows: true class, columns: predicted class):")
        cells = [(name, *map(str, row)) for name, row in zip(classes, confusion, strict=True)]
        print_line(markdown_table(("", *classes), cells))
        return
    mistakes = [
        (count, classes[true], classes[predicted])
        for true, row in enumerate(confusion)
        for predicted, count in enumerate(row)
        if true != predicted and count > 0
    ]
    largest = sorted(mistakes, key=lambda mistake: mistake[0], reverse=True)[:LARGEST]
    print_line(f"\nLargest of {len(mistakes)} confusions in all domains (true → predicted):")
    for count, true, predicted in largest:
        print_line(f"  {true} → {predicted}: {count:,}")


def _percent(scores: "Scores") -> tuple[str, str, str]:
    accuracy, macro_f1, error = (f"{value * 100:.1f}" for value in _scores(scores).values())
    return accuracy, macro_f1, error


@contextmanager
def _progress(*, drawn: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A function that draws how many samples are done, or None."""
    if not drawn:
        yield None
        return
    columns = TextColumn("evaluating"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(compact=True)
    with Progress(*columns, console=stderr, transient=True) as progress:
        task = progress.add_task("")
        yield lambda done, total: progress.update(task, completed=done, total=total)
