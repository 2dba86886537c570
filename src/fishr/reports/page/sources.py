"""What lies in the folders that a report is made of."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from fishr.errors import RunError
from fishr.records import DONE_FILE, MADE_BY_FILE, MISTAKES_FILE, Mistakes, RunHistory, RunRecord
from fishr.reports.run_folders import OnProgress, read_histories

T = TypeVar("T")

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
        histories: All runs; of restarts on colored digits with the method as algorithm.
        problems: Folders of runs that count for nothing, and why.
        results: What commands that make several runs wrote of them all: a comparison, or restarts on colored digits.
        analyses: Analyses of models.
        kept: Record of the model that was kept, by folder of a run that is done and of no sweep.
        mistakes: Of a model that was kept, by folder of its run.
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
    paths = list(dict.fromkeys(path.resolve() for path in paths))
    analyzed = [folder for path in paths for folder in (path, path / ANALYSES) if (folder / ANALYSIS).exists()]
    of_folders: dict[str, RunHistory] = {}
    problems: dict[str, str] = {}
    for path in paths:
        try:
            found = read_histories([path], on_progress)
        except RunError:
            if path not in analyzed:
                raise
            continue
        of_folders |= {history.folder: history for history in found.histories}
        problems |= found.problems
    histories = sorted(of_folders.values(), key=lambda run: (run.dataset, run.test_domains, run.algorithm, run.trial))
    results = {path: content for path, content in _read(paths, RESULTS, json.loads) if _is_of_many_runs(content)}
    alone = [Path(history.folder) for history in histories if not history.swept]
    folders = [Path(history.folder) for history in histories]
    return Sources(
        [_by_method(history, results) for history in histories],
        problems,
        list(results.values()),
        [
            Analysis(content, pq.read_table(folder / WEIGHTS))
            for folder, content in _read(analyzed, ANALYSIS, json.loads)
        ],
        {str(run): record for run, record in _read(alone, DONE_FILE, RunRecord.from_json)},
        {str(run): mistakes for run, mistakes in _read(folders, MISTAKES_FILE, Mistakes.from_json)},
        [content for _, content in _read(paths, MADE_BY_FILE, _made_by)],
    )


def _made_by(text: str) -> dict[str, Any]:
    content = json.loads(text)
    return {"command": content["command"], "versions": dict(content["versions"])}


def _is_of_many_runs(content: object) -> bool:
    """Whether a results.json is that of a comparison or of restarts, and not of something else."""
    return isinstance(content, dict) and (
        {"verdict", "accuracies"} <= content.keys() or {"summary", "runs"} <= content.keys()
    )


def _by_method(history: RunHistory, results: Mapping[Path, Mapping[str, Any]]) -> RunHistory:
    """Of restarts the method for the algorithm: several methods are one algorithm with other settings."""
    folder = Path(history.folder)
    method = folder.name.rpartition("-")[0]
    methods = results.get(folder.parent, {}).get("summary", {})
    return replace(history, algorithm=method) if method in methods else history


def _read(folders: Iterable[Path], name: str, parse: Callable[[str], T]) -> Iterator[tuple[Path, T]]:
    """The contents of the files of that name that there are, by folder."""
    for folder in folders:
        try:
            text = (folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        try:
            yield folder, parse(text)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"{folder / name} cannot be read ({type(error).__name__}: {error}): make it anew, or delete it"
            ) from None
