"""Reproduction of the Colored MNIST experiments of the paper (Tables 2, 5 and 6), on real MNIST."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fishr.files import write_text
from fishr.reports.tables import markdown_table, mean_and_std
from fishr.training.config import Precision
from fishr.workflows.colored import TITLES, MethodRun, Setting, Spread, summaries

TABLE_2_METHODS = ("erm", "irm", "vrex", "fishr")

PUBLISHED: Mapping[str, Spread] = {
    "erm": Spread((86.4, 14.0, 71.0), (0.2, 0.7, 0.7)),
    "irm": Spread((71.0, 65.6, 66.1), (0.5, 1.8, 0.2)),
    "vrex": Spread((71.7, 67.2, 68.6), (1.5, 1.5, 2.2)),
    "fishr": Spread((71.0, 69.5, 70.2), (0.9, 1.0, 1.1)),
}
"""Table 2 as in the README of the authors' repository: mean and std over 10 restarts, label flip 0.25."""

PUBLISHED_LABEL_FLIP = 0.25

COLUMNS = ("train", "unseen", "gray")


def setting(label_flip: float, precision: Precision, steps: int = 500) -> Setting:
    """The published hyperparameters."""
    return Setting(
        "colored-mnist-irm",
        width=390,
        lr=4.898536566546834e-4,
        l2=1.10794568e-3,
        penalty_weight=91257.18613115903,
        steps=steps,
        data_options={"label_flip": label_flip},
        precision=precision,
    )


def write_table(folder: Path, runs: Sequence[MethodRun], setting: Setting) -> str:
    """Write ``results.md`` into the folder; returns the table in it."""
    flip = setting.data_options["label_flip"]
    content = table(runs, PUBLISHED if flip == PUBLISHED_LABEL_FLIP else {})
    write_text(
        folder / "results.md",
        f"Colored MNIST, label flip {flip}, {setting.steps} updates, precision {setting.precision}: accuracy in %, "
        f"mean ± standard deviation over restarts\n\n{content}\n",
    )
    return content


def table(runs: Sequence[MethodRun], published: Mapping[str, Spread]) -> str:
    """Markdown table, measured beside published."""
    with_published = any(run.algorithm in published for run in runs)
    header = ["method", "restarts", *COLUMNS, *([f"{name}, published" for name in COLUMNS] if with_published else [])]
    rows = []
    for method, spread in summaries(runs).items():
        row = [TITLES[method], str(sum(run.algorithm == method for run in runs)), *_cells(spread)]
        if with_published:
            row += _cells(published[method]) if method in published else ["not known"] * len(COLUMNS)
        rows.append(row)
    return markdown_table(header, rows)


def _cells(spread: Spread) -> list[str]:
    return [mean_and_std(mean, std) for mean, std in zip(spread.mean, spread.std, strict=True)]
