"""``fishr report`` on 100,000 run folders with 1.7 million records: time and memory, without its index and with it.

The folders are generated, half as ours, half as DomainBed leaves them. Each measurement is a process of its own, from
its start to its end; memory is the peak of that process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import common
import numpy as np

from fishr.algorithms import ALGORITHMS
from fishr.records import CONFIG_FILE, DONE_FILE, FORMAT, RECORDS_FILE, SPLITS, Metrics, RunRecord
from fishr.reports import domainbed
from fishr.reports.run_folders import INDEX
from fishr.reports.tables import markdown_table

METHOD = """fishr report FOLDER --format csv: 4 datasets of 4 domains, each domain and each pair
held out, 25 algorithms, 20 draws, 5 trials, 17 records a run, accuracies at random. The files were written just before,
so they come from the system's page cache. One run changed: a record was added to it. All rules: with --selection all.
Medians over processes."""

DATASETS = ("VLCS", "PACS", "OfficeHome", "TerraIncognita")
NUM_ALGORITHMS, DRAWS, TRIALS, RECORDS, EVERY = 25, 20, 5, 17, 300
GIGABYTE = 10**9


@dataclass(frozen=True)
class Run:
    """What a folder is of."""

    number: int
    dataset: str
    algorithm: str
    held_out: tuple[int, ...]
    draw: int
    trial: int


def runs(draws: int, trials: int) -> Iterator[Run]:
    held_out = [*combinations(range(4), 1), *combinations(range(4), 2)]
    cells = product(DATASETS, sorted(ALGORITHMS)[:NUM_ALGORITHMS], held_out, range(draws), range(trials))
    for number, cell in enumerate(cells):
        yield Run(number, *cell)


def write_ours(folder: Path, run: Run, accuracies: np.ndarray) -> None:
    dataset, domains = domainbed.DATASETS[run.dataset]
    config = {
        "format": FORMAT,
        "data": dataset,
        "data_options": {"image_size": 224, "augmentation": "domainbed"},
        "test_domains": [domains[number] for number in run.held_out],
        "algorithm": run.algorithm,
        "hparams": {"lr": 5e-5 * (1 + run.draw), "weight_decay": 0.0, "batch_size": 32},
        "steps": RECORDS * EVERY,
        "checkpoint_every": EVERY,
        "seed": run.number,
        "trial": run.trial,
        "draw": run.draw,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2))
    records = [
        RunRecord(
            EVERY * (step + 1),
            {"loss": 0.5, "penalty": 0.1},
            {
                domain: {
                    split: Metrics(float(accuracies[step, of_split, number]), 0.5)
                    for of_split, split in enumerate(SPLITS)
                }
                for number, domain in enumerate(domains)
            },
            seconds_per_step=0.2,
        )
        for step in range(RECORDS)
    ]
    (folder / RECORDS_FILE).write_text("".join(record.to_json() + "\n" for record in records))
    (folder / DONE_FILE).write_text(records[-1].to_json())


def write_domainbeds(folder: Path, run: Run, accuracies: np.ndarray) -> None:
    args = {
        "dataset": run.dataset,
        "algorithm": run.algorithm.upper().replace("-", "_"),
        "test_envs": run.held_out,
        "hparams_seed": run.draw,
        "trial_seed": run.trial,
        "steps": None,
        "output_dir": str(folder),
    }
    hparams = {"lr": 5e-5 * (1 + run.draw), "weight_decay": 0.0, "batch_size": 32, "resnet18": False}
    records = [
        {
            **{
                f"env{number}_{split}_acc": float(accuracies[step, of_split, number])
                for number in range(4)
                for of_split, split in enumerate(SPLITS)
            },
            "args": args,
            "hparams": hparams,
            "step": EVERY * step,
            "step_time": 0.2,
            "loss": 0.5,
        }
        for step in range(RECORDS)
    ]
    (folder / domainbed.RECORDS).write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / domainbed.DONE).write_text("done")


def write_runs(top: Path, draws: int, trials: int) -> int:
    """The folders; returns how many there are."""
    generator = np.random.default_rng(0)
    all_runs = list(runs(draws, trials))
    for run in all_runs:
        folder = top / f"{run.number:06d}"
        folder.mkdir()
        accuracies = generator.integers(0, 1000, (RECORDS, len(SPLITS), 4)) / 1000
        (write_ours if run.trial % 2 else write_domainbeds)(folder, run, accuracies)
    return len(all_runs)


def report(top: Path, *options: str) -> dict[str, Any]:
    """Report in a process of its own."""
    command = [sys.executable, "-m", "fishr.cli", "report", str(top), "--format", "csv", "--quiet", *options]
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        output.seek(0)
        rows = output.read().count(b"\n") - 1
    return {"seconds": seconds, "bytes": 1024 * usage.ru_maxrss, "rows": rows}


def measure(top: Path, repeats: int) -> dict[str, Any]:
    """Without the index, with it, and after one run changed."""
    names = ("without index", "with index", "with index, all rules", "one run changed")
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    changed = next(top.glob(f"*/{RECORDS_FILE}"))
    for _ in range(repeats):
        (top / INDEX).unlink(missing_ok=True)
        results["without index"].append(report(top))
        results["with index"].append(report(top))
        results["with index, all rules"].append(report(top, "--selection", "all"))
        lines = changed.read_text().splitlines(keepends=True)
        last = json.loads(lines[-1])
        changed.write_text("".join([*lines, json.dumps(last | {"step": last["step"] + EVERY}) + "\n"]))
        results["one run changed"].append(report(top))
        common.progress.print({name: of_name[-1] for name, of_name in results.items()})
    return {
        name: {key: statistics.median(each[key] for each in of_name) for key in ("seconds", "bytes", "rows")}
        for name, of_name in results.items()
    }


def goals(results: Mapping[str, Any]) -> list[common.Goal]:
    return [
        common.Goal("without index: seconds", 60, False, results["without index"]["seconds"]),
        common.Goal("with index: seconds", 5, False, results["with index"]["seconds"]),
        common.Goal("memory in GB", 2, False, max(each["bytes"] for each in results.values()) / GIGABYTE),
    ]


def table(results: Mapping[str, Any], folders: int) -> str:
    rows = [
        [name, f"{folders:,}", f"{folders * RECORDS:,}", f"{of['seconds']:.1f} s", f"{of['bytes'] / GIGABYTE:.2f} GB"]
        for name, of in results.items()
    ]
    return markdown_table(["report", "runs", "records", "time", "memory"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.argument_parser(__doc__, repeats=3)
    parser.add_argument("--folder", type=Path, help="where the runs are written, about 2 GB (default: a temporary one)")
    arguments: argparse.Namespace = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        num_folders = write_runs(Path(folder), *((1, 2) if arguments.quick else (DRAWS, TRIALS)))
        results = measure(Path(folder), arguments.repeats)
    setup = common.describe_setup(arguments, ["pyarrow", "numpy", "fishr"], METHOD)
    common.write_results(arguments.output, "report_scale", setup, results, goals(results), table(results, num_folders))


if __name__ == "__main__":
    main()
