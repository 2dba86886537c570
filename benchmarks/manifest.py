"""A manifest of a million images: how long it takes to index it, and how much memory.

The manifest is generated, its files do not exist. Each measurement is a process of its own; memory is how much its peak
lies above what it had with the library imported.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from fishr.reports.tables import markdown_table

METHOD = """Columns path (45 characters), label (10 classes), domain (5), split and group (20 images each), rows
shuffled. read_manifest as fishr train calls it, before any image is opened; medians over processes."""

ROWS, QUICK_ROWS = 1_000_000, 1_000
SUFFIXES = (".csv", ".parquet")
MEGABYTE = 10**6

INDEX = """
import sys, time, json
from pathlib import Path
from fishr.data.listing import read_manifest

def memory(name):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])

before, start = memory("VmRSS"), time.perf_counter()
listing = read_manifest(Path(sys.argv[1]))
seconds = time.perf_counter() - start
images = sum(len(domain.labels) for domain in listing.domains.values())
print(json.dumps({"seconds": seconds, "bytes": memory("VmHWM") - before, "images": images}))
"""


def write_manifest(path: Path, rows: int) -> None:
    order = np.random.default_rng(0).permutation(rows)
    table = pa.table(
        {
            "path": [f"images/hospital_{i % 5}/patient{i // 20:07d}/{i:08d}.jpg" for i in order],
            "label": [f"class {i // 5 % 10}" for i in order],
            "domain": [f"hospital_{i % 5}" for i in order],
            "split": ["val" if i // 20 % 5 == 0 else "train" for i in order],
            "group": [f"patient{i // 20:07d}" for i in order],
        }
    )
    (pa.csv.write_csv if path.suffix == ".csv" else pa.parquet.write_table)(table, path)


def index(path: Path) -> dict[str, Any]:
    """Index the manifest in a process of its own."""
    done = subprocess.run([sys.executable, "-c", INDEX, str(path)], capture_output=True, text=True, check=True)
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def measure(rows: int, repeats: int) -> dict[str, Any]:
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for suffix in SUFFIXES:
            path = Path(folder, f"manifest{suffix}")
            write_manifest(path, rows)
            runs = [index(path) for _ in range(repeats)]
            assert {run["images"] for run in runs} == {rows}
            results[suffix] = {
                "images": rows,
                "file_bytes": path.stat().st_size,
                "seconds": statistics.median(run["seconds"] for run in runs),
                "bytes": statistics.median(run["bytes"] for run in runs),
            }
            common.progress.print(f"{suffix}: {results[suffix]}")
    return results


def goals(results: dict[str, Any]) -> list[common.Goal]:
    return [
        goal
        for suffix, measured in results.items()
        for goal in (
            common.Goal(f"{suffix}: seconds", 60, False, measured["seconds"]),
            common.Goal(f"{suffix}: memory in MB", 200, False, measured["bytes"] / MEGABYTE),
        )
    ]


def table(results: dict[str, Any]) -> str:
    rows = [
        [
            suffix,
            f"{measured['images']:,}",
            f"{measured['file_bytes'] / MEGABYTE:.0f} MB",
            f"{measured['seconds']:.2f} s",
            f"{measured['bytes'] / MEGABYTE:.0f} MB",
        ]
        for suffix, measured in results.items()
    ]
    return markdown_table(["manifest", "images", "file", "time", "memory"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    arguments: argparse.Namespace = common.argument_parser(__doc__, repeats=5).parse_args(argv)
    results = measure(QUICK_ROWS if arguments.quick else ROWS, arguments.repeats)
    setup = common.describe_setup(arguments, ["pyarrow", "numpy", "fishr"], METHOD)
    common.write_results(arguments.output, "manifest", setup, results, goals(results), table(results))


if __name__ == "__main__":
    main()
