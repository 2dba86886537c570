"""What the benchmarks share: machine and versions, timing, goals, the files of results.

Import it before torch.
"""

import os

# Huge pages in torch's CPU allocator, as the fishr command sets them; torch reads this at its first large allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fishr.files import write_text
from fishr.reports.tables import markdown_table

RESULTS = Path(__file__).parent / "results"
MIB = 2**20

progress = Console(stderr=True)


def argument_parser(description: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats, help="timed calls of each side (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that the script works; no goals judged")
    return parser


def describe_setup(arguments: argparse.Namespace, packages: Sequence[str], method: str) -> dict[str, Any]:
    """Where, when, with what and how the numbers came about."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        },
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "environment": {"THP_MEM_ALLOC_ENABLE": os.environ["THP_MEM_ALLOC_ENABLE"]},
        "repeats": arguments.repeats,
        "quick": arguments.quick,
        "method": " ".join(method.split()),
    }


def time_alternating(
    jobs: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warm_up: int = 2,
    before: Callable[[str], object] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds of each call; in every round each job runs once, in turning order, so that drift hits all alike.

    ``before`` is called with a job's name just before it, and not timed.
    """
    names = list(jobs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()  # the collections between calls then look at what the calls left, and nothing else
    for turn in range(warm_up + repeats):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            before(name)
            duration = time_call(jobs[name])
            if turn >= warm_up:
                seconds[name].append(duration)
    gc.unfreeze()
    return seconds


def paired_ratios(seconds: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Ratio of the durations of each round."""
    return [duration / other for duration, other in zip(seconds, reference, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": median, "q1": low, "q3": high}


@dataclass(frozen=True)
class Goal:
    """A bound that was set before the measurement, and what came out; None if it was not measured."""

    name: str
    bound: float
    at_least: bool
    measured: float | None

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def goals_table(goals: Sequence[Goal]) -> str:
    verdicts = {True: "yes", False: "NO", None: "not measured"}
    rows = [
        [
            goal.name,
            f"{'≥' if goal.at_least else '≤'} {goal.bound:g}",
            "-" if goal.measured is None else f"{goal.measured:.3g}" if goal.at_least else f"{goal.measured:.3f}",
            verdicts[goal.met],
        ]
        for goal in goals
    ]
    return markdown_table(["goal", "bound", "measured", "met"], rows)


def write_results(
    folder: Path, name: str, setup: Mapping[str, Any], results: Mapping[str, Any], goals: Sequence[Goal], table: str
) -> None:
    """Write ``name.json`` and ``name.md``, and show the latter."""
    goals = [] if setup["quick"] else goals
    folder.mkdir(parents=True, exist_ok=True)
    content = {"setup": setup, "results": results, "goals": [goal.as_dict() for goal in goals]}
    write_text(folder / f"{name}.json", json.dumps(content, indent=2) + "\n")
    without = "Toy sizes: these numbers say nothing, no goal is judged." if setup["quick"] else "No goal was set."
    judged = goals_table(goals) if goals else without
    text = f"# {name}\n\n{table}\n\n{judged}\n\n{_setup_lines(setup)}\n"
    write_text(folder / f"{name}.md", text)
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def time_call(job: Callable[[], object]) -> float:
    """Seconds of one call, without garbage collection."""
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        job()
        return time.perf_counter() - start
    finally:
        gc.enable()


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _setup_lines(setup: Mapping[str, Any]) -> str:
    machine, versions = setup["machine"], setup["versions"]
    environment = ", ".join(f"{name}={value}" for name, value in setup["environment"].items())
    return "\n".join(
        [
            f"- {setup['date']}; {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; "
            f"{setup['threads']} threads",
            f"- {', '.join(f'{name} {number}' for name, number in versions.items())}; {environment}",
            f"- {setup['repeats']} repeats. {setup['method']}",
        ]
    )
