"""Predictions as a table: CSV, JSON lines or Parquet, on a stream or in a file that is there once it is complete."""

import csv
import errno
import io
import json
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self, cast

import pyarrow as pa
import pyarrow.parquet

from fishr.deploy.predict import Prediction, printable
from fishr.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet")
"""Endings of a file of predictions, which decide its format."""

ROWS_PER_GROUP = 8192
"""Rows of a Parquet file that wait in memory to be written together."""


@dataclass(frozen=True)
class Columns:
    """The columns of a table of predictions.

    They are path (:attr:`Prediction.printable_path`), label and probability, then label_2, probability_2 and so on,
    abstain if it is asked for, and error, which is empty where there is an answer.
    """

    top_k: int = 1
    abstain: bool = False

    @property
    def schema(self) -> pa.Schema:
        """Names and types."""
        columns = [("path", pa.string())]
        for end in ("", *(f"_{rank}" for rank in range(2, self.top_k + 1))):
            columns += [(f"label{end}", pa.string()), (f"probability{end}", pa.float64())]
        if self.abstain:
            columns.append(("abstain", pa.bool_()))
        return pa.schema([*columns, ("error", pa.string())])

    def values(self, prediction: Prediction) -> list[Any]:
        """A prediction's value in each column."""
        top = [*prediction.top, *[(None, None)] * self.top_k][: self.top_k]
        abstain = [prediction.abstain] if self.abstain else []
        return [prediction.printable_path, *(value for pair in top for value in pair), *abstain, prediction.error]


class PredictionLines:
    """Predictions as lines of a stream, each there as soon as it is written: CSV with a header, or JSON.

    Attributes:
        num_rows: Predictions written.
    """

    def __init__(self, stream: BinaryIO, columns: Columns, format: Literal["csv", "jsonl"]) -> None:
        self.num_rows = 0
        self._stream, self._columns, self._format = stream, columns, format
        self._names: list[str] = columns.schema.names
        self._size = 0
        if format == "csv":
            self._write(_csv_line(self._names))

    def write(self, prediction: Prediction) -> None:
        """Add a line."""
        values = self._columns.values(prediction)
        if self._format == "csv":
            self._write(_csv_line(values))
        else:
            self._write(json.dumps(dict(zip(self._names, values, strict=True))) + "\n")
        self.num_rows += 1

    def finish(self) -> None:
        """Cut off a line that was not written to its end; for files alone."""
        self._stream.truncate(self._size)

    def _write(self, line: str) -> None:
        content = line.encode()
        rest = memoryview(content)
        while rest:  # a stream that is not buffered may take a part
            rest = rest[self._stream.write(rest) :]
        self._stream.flush()
        self._size += len(content)


class PredictionFile:
    """A file of predictions: CSV, JSON lines or Parquet, by its ending. Use it in a ``with`` block.

    It is written as ``NAME.partial.csv`` and becomes ``NAME.csv`` at the end of the block. After an error the rows so
    far are kept, in a file that can be read; only Parquet for which there was no space is lost.

    Args:
        path: The file.
        columns: Its columns.

    Raises:
        ConfigError: the path is a folder or has another ending.
        DataError: the file cannot be written; also raised by :meth:`write` and at the end of the block.
    """

    def __init__(self, path: Path, columns: Columns) -> None:
        self.check_path(path)
        self.path, self.partial = path, path.with_name(f"{path.stem}.partial{path.suffix}")
        try:
            # Not buffered: what the disk does not take is known at once.
            self._file = cast(BinaryIO, self.partial.open("wb", buffering=0))
        except OSError as error:
            raise self._unwritable(error) from error
        suffix = path.suffix.lower()
        self._rows: PredictionLines | _ParquetRows
        try:
            if suffix == ".parquet":
                self._rows = _ParquetRows(self._file, columns)
            else:
                self._rows = PredictionLines(self._file, columns, "csv" if suffix == ".csv" else "jsonl")
        except OSError as error:
            self._discard()
            raise self._unwritable(error) from error

    @staticmethod
    def check_path(path: Path) -> None:
        """Raises ConfigError for a path that no file of predictions can have."""
        if path.is_dir():
            raise ConfigError(f"{path} is a folder: name the file to write, such as {path / 'predictions.csv'}")
        if path.suffix.lower() not in TABLE_SUFFIXES:
            raise ConfigError(f"{path} ends in {path.suffix!r}: expected one of {', '.join(TABLE_SUFFIXES)}")

    def write(self, prediction: Prediction) -> None:
        """Add a row."""
        try:
            self._rows.write(prediction)
        except OSError as error:
            raise self._unwritable(error, f"; {self.keep()}") from error

    def keep(self) -> str:
        """Close the file as it is, before its end, and say what is in it."""
        with suppress(OSError):
            self._close()
        rows = self._rows.num_rows
        if rows == 0:
            self._discard()
        if not self.partial.exists():
            return "no rows are kept"
        return f"{rows:,} {'row is' if rows == 1 else 'rows are'} kept in {printable(self.partial)}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            try:
                self._close()
                self.partial.replace(self.path)
            except OSError as failure:
                raise self._unwritable(failure, f"; {self.keep()}") from failure
        elif not self._file.closed:
            logger.warning(self.keep())

    def _close(self) -> None:
        """Make the file complete, or remove it if it cannot be."""
        if self._file.closed:
            return
        try:
            self._rows.finish()
        except OSError:
            self._discard()
            raise
        with self._file:
            os.fsync(self._file.fileno())

    def _discard(self) -> None:
        self._file.close()
        self.partial.unlink(missing_ok=True)

    def _unwritable(self, error: OSError, kept: str = "") -> DataError:
        cure = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "name a file that can be written"
        return DataError(f"{printable(self.path)} cannot be written ({error.strerror or error}): {cure}{kept}")


class _ParquetRows:
    def __init__(self, file: BinaryIO, columns: Columns) -> None:
        self.num_rows = 0
        self._columns = columns
        self._writer = pa.parquet.ParquetWriter(file, columns.schema)
        self._waiting: list[list[Any]] = []
        self._damaged = False

    def write(self, prediction: Prediction) -> None:
        self._waiting.append(self._columns.values(prediction))
        self.num_rows += 1
        if len(self._waiting) == ROWS_PER_GROUP:
            self._write_group()

    def finish(self) -> None:
        """Write the rows that wait and the footer; raises OSError if a group was not written to its end."""
        try:
            if self._waiting and not self._damaged:
                self._write_group()
        finally:
            self._writer.close()
        if self._damaged:
            raise OSError(errno.EIO, "a part of the file is missing")

    def _write_group(self) -> None:
        # After a failure the writer would go on, and end a file that cannot be read.
        self._damaged = True
        schema = self._columns.schema
        arrays = [
            pa.array(values, kind) for values, kind in zip(zip(*self._waiting, strict=True), schema.types, strict=True)
        ]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
        self._damaged = False
        self._waiting.clear()


def _csv_line(values: Iterable[Any]) -> str:
    line = io.StringIO()
    # Some versions put a text with a line break into quotes only if lines end with the same character.
    csv.writer(line, lineterminator="\r\n").writerow(
        [str(value).lower() if isinstance(value, bool) else value for value in values]
    )
    return line.getvalue().removesuffix("\r\n") + "\n"
