"""Results of a benchmark as text, Markdown, LaTeX, CSV or JSON."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from fishr.reports.benchmark import Estimate, Results, Row
from fishr.reports.comparison import BASELINE
from fishr.reports.tables import latex_table, markdown_table, text_table

TITLES = {
    "training": "training-domain validation",
    "leave-one-out": "leave-one-domain-out validation",
    "oracle": "test-domain validation, an oracle",
}
DRAWS = "a trial's result is that of its best hyperparameter draw"
ONE_DRAW = "all trials have the hyperparameters of draw {}"
CAPTION = (
    "Accuracy in % on the in-split of the held-out domain, mean ± standard error over trials; {draws}. Difference to "
    f"{BASELINE}: paired over trials, with a 95% interval by bootstrap of the trials of each held-out domain (too "
    "narrow where trials are few; it says nothing of other domains). Hours: training of all runs."
)


@dataclass(frozen=True)
class Table:
    """A table for readers, and what is to be known of it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    remarks: Sequence[str]


def caption(results: Results) -> str:
    """What the numbers in the tables are."""
    return CAPTION.format(draws=ONE_DRAW.format(*results.draws) if len(results.draws) == 1 else DRAWS)


def tables(results: Results) -> Iterator[Table]:
    """One table for each dataset, and the averages where there are several; the last one has the ranks."""
    several = len(results.datasets) > 1
    for dataset, rows in results.datasets.items():
        header, cells = _cells(rows, {} if several else results.ranks)
        yield Table(f"{dataset}, {TITLES[results.rule]}", header, cells, results.remarks[dataset])
    if several:
        header, cells = _cells(results.averages, results.ranks)
        yield Table(f"averages, {TITLES[results.rule]}", header, cells, results.remarks_on_averages)


def _cells(rows: Sequence[Row], ranks: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    header = ["algorithm", *rows[0].cells, "average", f"difference to {BASELINE}", "hours"]
    if ranks:
        header.append("mean rank")
    cells = [
        [
            row.algorithm,
            *("missing" if cell is None else str(cell) for cell in row.cells.values()),
            "" if row.average is None else f"{row.average:.1f}",
            "" if row.difference is None else str(row.difference),
            f"{row.hours:.1f}",
            *([f"{ranks[row.algorithm]:.1f}" if row.algorithm in ranks else ""] if ranks else []),
        ]
        for row in rows
    ]
    return header, cells


def as_text(results: Sequence[Results]) -> str:
    return _joined(results, lambda title: title, text_table)


def as_markdown(results: Sequence[Results]) -> str:
    return _joined(results, lambda title: f"## {title}", markdown_table)


def as_latex(results: Sequence[Results]) -> str:
    """Tables for a document that uses the package booktabs."""
    return _joined(results, lambda title: f"% {title}", latex_table, "% ")


def _joined(
    results: Sequence[Results],
    heading: Callable[[str], str],
    table_of: Callable[[Sequence[str], Sequence[Sequence[str]]], str],
    comment: str = "",
) -> str:
    parts = []
    for table in (table for each in results for table in tables(each)):
        parts += [heading(table.title), table_of(table.header, table.rows)]
        if table.remarks:
            parts.append("\n".join(f"{comment}- {remark}" for remark in table.remarks))
    return "\n\n".join([*parts, comment + caption(results[0])]) + "\n"


def as_csv(results: Sequence[Results]) -> str:
    """A line for each held-out domain, for each dataset (no held-out domain) and for all (no dataset)."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for each in results:
        for dataset, rows in each.datasets.items():
            for row in rows:
                of_row = {"selection": each.rule, "dataset": dataset, "algorithm": row.algorithm}
                for domain, cell in row.cells.items():
                    writer.writerow({**of_row, "held_out": domain, **_numbers(cell)})
                of_trials = next(average for average in each.averages if average.algorithm == row.algorithm)
                writer.writerow({**of_row, **_numbers(of_trials.cells[dataset]), **_of_row(row)})
        for row in each.averages:
            of_all = {"accuracy": row.average, "rank": each.ranks.get(row.algorithm), **_of_row(row)}
            writer.writerow({"selection": each.rule, "algorithm": row.algorithm, **of_all})
    return text.getvalue()


CSV_COLUMNS = (
    *("selection", "dataset", "held_out", "algorithm", "accuracy", "error", "trials"),
    *("difference", "low", "high", "hours", "rank"),
)


def _numbers(cell: Estimate | None) -> dict[str, float]:
    return {} if cell is None else {"accuracy": cell.mean, "error": cell.error, "trials": cell.trials}


def _of_row(row: Row) -> dict[str, float | None]:
    of_row: dict[str, float | None] = {"hours": row.hours}
    if row.difference is not None:
        of_row |= {"difference": row.difference.mean, "low": row.difference.low, "high": row.difference.high}
    return of_row


def as_json(results: Sequence[Results]) -> str:
    return json.dumps({each.rule: asdict(each) for each in results}, indent=2) + "\n"


FORMATS: Mapping[str, Callable[[Sequence[Results]], str]] = {
    "text": as_text,
    "markdown": as_markdown,
    "latex": as_latex,
    "csv": as_csv,
    "json": as_json,
}
