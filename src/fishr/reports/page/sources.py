"""What lies in the folders that a report is made of."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fishr.errors import RunError
from fishr.records import DONE_FILE, MADE_BY_FILE, MISTAKES_FILE, Mistakes, RunHistory, RunRecord
from fishr.reports.run_folders import OnProgress, read_histories

RESULTS, ANALYSIS, WEIGHTS = "results.json", "analysis.json", "weights.parquet"
ANALYSES = "analysis"
"""Folder of an analysis among the runs that it is of."""


@dataclass(frozen=True)
class Analysis:
    """What ``fishr analyze`` wrote.

    Attributes:
        content: Its ``analysis.json``.
        weights: Its ``weights.parquet``.
    """

    content: Mapping[str, Any]
    weights: pa.Table


@dataclass(frozen=True)
class Sources:
    """What a report is made of.

    Attributes:
        histories: All runs.
        problems: Folders of runs that count for nothing, and why.
        results: What commands that make several runs wrote of them all: a comparison, or restarts on colored digits.
        analyses: Analyses of models.
        kept: Record of the model that was kept, by folder of a run that is done and of no sweep.
        mistakes: Of such a model, by folder of its run.
        made_by: The commands that made the folders, and with what.
    """

    histories: Sequence[RunHistory]
    problems: Mapping[str, str]
    results: Sequence[Mapping[str, Any]]
    analyses: Sequence[Analysis]
    kept: Mapping[str, RunRecord]
    mistakes: Mapping[str, Mistakes]
    made_by: Sequence[Mapping[str, Any]]


def read_sources(paths: Sequence[Path], on_progress: OnProgress = lambda done, total: None) -> Sources:
    """What lies in folders: runs at any depth, analyses and what commands wrote at their top.

    Raises:
        RunError: a path is no folder, holds nothing that a report could show, or has a file that cannot be read.
    """
    analyzed = [folder for path in paths for folder in (path, path / ANALYSES) if (folder / ANALYSIS).exists()]
    found = read_histories([path for path in paths if path not in analyzed], on_progress)
    done = [
        Path(history.folder)
        for history in found.histories
        if not history.swept and (Path(history.folder) / DONE_FILE).exists()
    ]
    return Sources(
        found.histories,
        found.problems,
        _read(path / RESULTS for path in paths),
        [
            Analysis(content, pq.read_table(folder / WEIGHTS))
            for folder in analyzed
            for content in _read([folder / ANALYSIS])
        ],
        {str(run): RunRecord.from_json((run / DONE_FILE).read_text(encoding="utf-8")) for run in done},
        {
            str(run): Mistakes.from_json((run / MISTAKES_FILE).read_text(encoding="utf-8"))
            for run in done
            if (run / MISTAKES_FILE).exists()
        },
        _read(path / MADE_BY_FILE for path in paths),
    )


def _read(files: Iterable[Path]) -> list[dict[str, Any]]:
    """The contents of those files that there are."""
    contents = []
    for file in files:
        if file.exists():
            try:
                contents.append(json.loads(file.read_bytes()))
            except ValueError as error:
                raise RunError(f"{file} cannot be read ({error}): make it anew, or delete it") from None
    return contents
