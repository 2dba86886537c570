"""Histories of the runs in folders: ours and DomainBed's, side by side, at any depth.

What was read is kept in ``.fishr-index.arrow`` in the folder asked for; only runs that changed since are read again.
"""

import json
import os
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fishr.errors import RunError
from fishr.files import write_bytes
from fishr.records import CONFIG_FILE, DONE_FILE, FORMAT, MAKER, RECORDS_FILE, SPLITS, RunHistory, complete_lines
from fishr.reports import domainbed

OF_ONE_RUN = ("format", "data", "algorithm", "hparams", "seed", "trial", "draw", "test_domains")
"""What differs between the runs of one table; the rest of a config is its protocol."""

NOT_EVALUATED = {"accuracy": np.nan}

INDEX = ".fishr-index.arrow"
STAMP = ("folder_changed", "records_changed", "records_size")
"""What changes when a run does: times in ns, and bytes."""

SCHEMA = pa.schema(
    {
        "folder": pa.string(),
        **dict.fromkeys(STAMP, pa.int64()),
        "dataset": pa.string(),
        "algorithm": pa.string(),
        "test_domains": pa.list_(pa.string()),
        "swept": pa.bool_(),
        "draw": pa.int64(),
        "trial": pa.int64(),
        "hparams": pa.string(),
        "protocol": pa.string(),
        "domains": pa.list_(pa.string()),
        "steps": pa.list_(pa.int64()),
        "accuracies": pa.list_(pa.float64()),
        "hours": pa.float64(),
        "done": pa.bool_(),
    },
    {"format": "3"},
)
JUST_NOW_NS = 2 * 10**9
CHUNK = 500
"""Runs that become rows at a time."""

OnProgress = Callable[[int, int], None]
"""``(folders read, folders to read)``"""


@dataclass(frozen=True)
class Found:
    """What lies in the folders.

    Attributes:
        histories: The runs, sorted by folder.
        problems: Folders of runs that count for nothing, and why.
    """

    histories: Sequence[RunHistory]
    problems: Mapping[str, str]


class _UnreadableError(Exception):
    """Why a folder counts for nothing."""


def read_histories(paths: Sequence[Path], on_progress: OnProgress = lambda done, total: None) -> Found:
    """The runs in folders, at any depth.

    Args:
        paths: The folders: runs, or folders with runs in them.
        on_progress: Is told how many folders have been read, of those that no index has.

    Raises:
        RunError: a path is no folder, or holds no run.
    """
    histories: dict[str, RunHistory] = {}
    problems: dict[str, str] = {}
    for path in paths:
        if not path.is_dir():
            raise RunError(f"{path} is no folder: give folders with runs in them")
        table, of_path = _read(path, on_progress)
        if table.num_rows == 0 and not of_path:
            raise RunError(f"there is no run in {path}: no folder with {CONFIG_FILE} or {domainbed.RECORDS}")
        histories |= {history.folder: history for history in _histories(path.resolve(), table)}
        problems |= of_path
    return Found([histories[folder] for folder in sorted(histories)], problems)


# Folders


def _read(top: Path, on_progress: OnProgress) -> tuple[pa.Table, dict[str, str]]:
    """The runs below a folder, from its index where they have not changed; and why others are none."""
    index = _read_index(top)
    stamps = zip(*(index[name].to_pylist() for name in STAMP), strict=True)
    known = dict(zip(index["folder"].to_pylist(), enumerate(stamps), strict=True))
    unchanged: list[int] = []
    changed: list[str] = []
    problems: dict[str, str] = {}
    for folder in _run_folders(top, known, problems):
        if folder in known and known[folder][1] == _stamp(f"{top}/{folder}"):
            unchanged.append(known[folder][0])
        else:
            changed.append(folder)

    # Taking rows copies them, which costs time where there are many.
    tables = [index if unchanged == [*range(index.num_rows)] else index.take(pa.array(unchanged, pa.int64()))]
    for start in range(0, len(changed), CHUNK):
        on_progress(start, len(changed))
        rows = []
        for folder in changed[start : start + CHUNK]:
            stamp = _stamp(f"{top}/{folder}")  # before the records are read: they may be written meanwhile
            try:
                rows.append(_as_row(_read_run(top / folder), folder, stamp))
            except _UnreadableError as error:
                problems[_below(top, folder)] = str(error)
        tables.append(pa.Table.from_pylist(rows, SCHEMA))
    on_progress(len(changed), len(changed))
    table = pa.concat_tables(tables).combine_chunks()
    if changed != ["."] and not table.num_rows == len(unchanged) == index.num_rows:
        _write_index(top, table)
    return table, problems


def _run_folders(top: Path, known: Container[str], problems: dict[str, str]) -> Iterator[str]:
    """Folders of runs below ``top``, relative to it (``.`` is itself); those known without a look into them.

    Links are not followed. Folders that cannot be looked into are added to the problems.
    """
    waiting = ["."]
    while waiting:
        folder = waiting.pop()
        if folder in known:
            yield folder
            continue
        try:
            folder.encode()
            with os.scandir(f"{top}/{folder}") as entries:
                inside = {entry.name: entry for entry in entries}
        except (OSError, UnicodeEncodeError) as error:
            problems[_below(top, folder)] = f"cannot be read ({type(error).__name__})"
            continue
        if CONFIG_FILE in inside or domainbed.RECORDS in inside:
            yield folder
        else:
            waiting += [
                os.path.normpath(f"{folder}/{name}")
                for name, entry in inside.items()
                if not name.startswith(".") and entry.is_dir(follow_symlinks=False)
            ]


def _below(top: Path, folder: str) -> str:
    return os.path.normpath(f"{top}/{folder}").encode(errors="replace").decode()


def _stamp(folder: str) -> tuple[int, int, int] | None:
    """As :data:`STAMP` names it; None where there are no records, or they have just been written.

    What is written twice within a tick of the file system's clock has the same stamp.
    """
    for name in (RECORDS_FILE, domainbed.RECORDS):
        with suppress(FileNotFoundError):
            records = os.stat(f"{folder}/{name}")  # noqa: PTH116 - Path costs seconds at 100,000 runs
            changed = os.stat(folder).st_mtime_ns  # noqa: PTH116
            if time.time_ns() - max(changed, records.st_mtime_ns) < JUST_NOW_NS:
                return None
            return changed, records.st_mtime_ns, records.st_size
    return None


def _read_run(folder: Path) -> RunHistory:
    """The run in a folder.

    Raises:
        _UnreadableError: it counts for nothing.
    """
    is_ours = (folder / CONFIG_FILE).exists()
    try:
        records = _read_records(folder / (RECORDS_FILE if is_ours else domainbed.RECORDS))
        if is_ours:
            return _history(folder, json.loads((folder / CONFIG_FILE).read_bytes()), records)
        return domainbed.history(folder, records)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise _UnreadableError(f"cannot be read ({type(error).__name__}: {error})") from None


def _read_records(file: Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    try:
        records.extend(map(json.loads, complete_lines(file)))
    except FileNotFoundError:
        pass
    except ValueError:
        raise _UnreadableError(f"line {len(records) + 1} of {file.name} is damaged") from None
    if not records:
        raise _UnreadableError("no records yet")
    return records


def _history(folder: Path, config: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> RunHistory:
    if config["format"] != FORMAT:
        raise _UnreadableError(f"written by another version of fishr (format {config['format']}, not {FORMAT})")
    domains = tuple(records[0]["domains"])
    steps = np.array([record["step"] for record in records])
    durations = np.array([record["seconds_per_step"] for record in records]) * np.diff(steps, prepend=0)
    return RunHistory(
        folder=str(folder),
        dataset=config["data"],
        algorithm=config["algorithm"],
        test_domains=tuple(config["test_domains"]),
        swept=config.get("draw") is not None,
        draw=config.get("draw") or 0,
        trial=config["trial"],
        hparams=config["hparams"],
        protocol={MAKER: "fishr"} | {name: value for name, value in config.items() if name not in OF_ONE_RUN},
        domains=domains,
        steps=steps,
        accuracies=np.array(
            [
                [
                    [record["domains"][domain].get(split, NOT_EVALUATED)["accuracy"] for domain in domains]
                    for record in records
                ]
                for split in SPLITS
            ]
        ),
        hours=float(durations.sum()) / 3600,
        done=(folder / DONE_FILE).exists(),
    )


# The index: a row for each run


def _as_row(history: RunHistory, folder: str, stamp: tuple[int, int, int] | None) -> dict[str, Any]:
    return {
        **{name: getattr(history, name) for name in SCHEMA.names if name not in STAMP},
        **dict(zip(STAMP, stamp or (0, 0, 0), strict=True)),
        "folder": folder,
        "hparams": json.dumps(history.hparams),
        "protocol": json.dumps(history.protocol),
        "accuracies": history.accuracies.ravel(),
    }


def _histories(top: Path, table: pa.Table) -> Iterator[RunHistory]:
    """The rows of a table; their arrays are views of it."""
    parsed = cache(json.loads)
    steps = _views(table["steps"])
    domains = [tuple(names) for names in table["domains"].to_pylist()]
    columns = {
        "folder": [os.path.normpath(f"{top}/{folder}") for folder in table["folder"].to_pylist()],
        "test_domains": [tuple(names) for names in table["test_domains"].to_pylist()],
        "hparams": [parsed(text) for text in table["hparams"].to_pylist()],
        "protocol": [parsed(text) for text in table["protocol"].to_pylist()],
        "domains": domains,
        "steps": steps,
        "accuracies": [
            values.reshape(len(SPLITS), len(of_steps), len(of_domains))
            for values, of_steps, of_domains in zip(_views(table["accuracies"]), steps, domains, strict=True)
        ],
    }
    columns |= {name: table[name].to_pylist() for name in SCHEMA.names if name not in (*STAMP, *columns)}
    for values in zip(*columns.values(), strict=True):
        yield RunHistory(**dict(zip(columns, values, strict=True)))


def _views(column: pa.ChunkedArray) -> list[NDArray[Any]]:
    """The lists of a column as views of their values."""
    if len(column) == 0:
        return []
    lists = column.combine_chunks()
    values = lists.values.to_numpy()
    return [values[start:end] for start, end in pairwise(lists.offsets.to_numpy())]


def _read_index(top: Path) -> pa.Table:
    """The index of a folder, empty where there is none that can be used."""
    try:
        with pa.memory_map(str(top / INDEX)) as file:
            table = pa.ipc.open_file(file).read_all()
    except (OSError, pa.ArrowException):
        return SCHEMA.empty_table()
    return table if table.schema.equals(SCHEMA, check_metadata=True) else SCHEMA.empty_table()


def _write_index(top: Path, table: pa.Table) -> None:
    """Write the index, where the folder may be written to."""
    buffer = pa.BufferOutputStream()
    with pa.ipc.new_file(buffer, SCHEMA) as writer:
        writer.write_table(table)
    with suppress(OSError):
        write_bytes(top / INDEX, buffer.getvalue().to_pybytes())
