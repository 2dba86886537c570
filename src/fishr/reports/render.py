"""Results of a benchmark as text, Markdown, LaTeX, CSV or JSON."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from fishr.reports.benchmark import Results, Row
from fishr.reports.comparison import BASELINE
from fishr.reports.tables import latex_table, markdown_table, text_table

TITLES = {
    "training": "training-domain validation",
    "leave-one-out": "leave-one-domain-out validation",
    "oracle": "test-domain validation, an oracle",
}
CAPTION = (
    "Accuracy in % on the in-split of the held-out domain, mean ± standard error over trials; a trial's result is that "
    f"of its best hyperparameter draw. Difference to {BASELINE}: paired over held-out domains and trials, with a 95% "
    "bootstrap interval. Hours: training of all runs."
)


@dataclass(frozen=True)
class Table:
    """A table for readers, and what is to be known of it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    remarks: Sequence[str]


def tables(results: Results) -> Iterator[Table]:
    """One table for each dataset, and the averages where there are several."""
    for dataset, rows in results.datasets.items():
        yield Table(f"{dataset}, {TITLES[results.rule]}", *_cells(rows), results.remarks[dataset])
    if len(results.datasets) > 1:
        header, cells = _cells(results.averages)
        ranks = [results.ranks.get(row.algorithm) for row in results.averages]
        cells = [[*row, "" if rank is None else f"{rank:.1f}"] for row, rank in zip(cells, ranks, strict=True)]
        yield Table(f"averages, {TITLES[results.rule]}", [*header, "mean rank"], cells, results.remarks_on_averages)


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    header = ["algorithm", *rows[0].cells, "average", f"difference to {BASELINE}", "hours"]
    cells = [
        [
            row.algorithm,
            *("missing" if cell is None else str(cell) for cell in row.cells.values()),
            "" if row.average is None else f"{row.average:.1f}",
            "" if row.difference is None else str(row.difference),
            f"{row.hours:.1f}",
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
    return "\n\n".join([*parts, comment + CAPTION]) + "\n"


def as_csv(results: Sequence[Results]) -> str:
    """A line for each number: of a held-out domain, of a dataset's average (no domain), of all (no dataset)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("selection", "dataset", "held_out", "algorithm", "accuracy", "error", "trials"))
    for each in results:
        for dataset, rows in each.datasets.items():
            for row in rows:
                for domain, cell in row.cells.items():
                    if cell is not None:
                        writer.writerow((each.rule, dataset, domain, row.algorithm, cell.mean, cell.error, cell.trials))
        for row in each.averages:
            for dataset, cell in row.cells.items():
                if cell is not None:
                    writer.writerow((each.rule, dataset, "", row.algorithm, cell.mean, cell.error, cell.trials))
            if row.average is not None:
                writer.writerow((each.rule, "", "", row.algorithm, row.average, "", ""))
    return text.getvalue()


def as_json(results: Sequence[Results]) -> str:
    return json.dumps({each.rule: asdict(each) for each in results}, indent=2) + "\n"


FORMATS: Mapping[str, Callable[[Sequence[Results]], str]] = {
    "text": as_text,
    "markdown": as_markdown,
    "latex": as_latex,
    "csv": as_csv,
    "json": as_json,
}
