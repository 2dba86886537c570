"""20,000 training steps in one process: memory, open files, threads and tensors over the steps.

Two runs of the training loop with Fishr, as ``fishr train`` makes them: vectors (Colored Digits, an MLP), and images
(generated files through decoding, cache and augmentation, timm's test_resnet).
"""

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common  # sets torch's allocator up: before torch
import numpy as np
import plotly.graph_objects as go
from PIL import Image
from plotly.subplots import make_subplots
from torch import Tensor

from fishr.data import MultiDomainDataset, load_dataset
from fishr.data.image_dataset import image_dataset
from fishr.models.backbone import backbone_config
from fishr.models.build import ModelConfig
from fishr.reports.figures import write_images
from fishr.reports.palette import PALETTE
from fishr.reports.tables import markdown_table
from fishr.training import RunConfig, train
from fishr.training.observer import Silent

METHOD = """Both runs in this process, one after the other, on the CPU, with selection by validation and a checkpoint
every 1,000 steps. An observer of the run reads resident memory, open files and threads of the process from /proc, and
counts the tensors that Python's garbage collector knows; nothing is collected for it. Growth: median over the last
quarter of the steps minus median over the second quarter; they lie half a run apart, 10,000 steps. The first quarter is
the warm-up, in which the penalty is switched on and the first weights are kept."""

MOST_MEMORY = 1.0
"""MiB by which 10,000 steps may grow a process. Of files, threads and tensors there may be none more."""


@dataclass(frozen=True)
class Size:
    """How long the runs are."""

    steps: int
    checkpoint_every: int
    sample_every: int


FULL = Size(steps=20_000, checkpoint_every=1_000, sample_every=100)
QUICK = Size(steps=16, checkpoint_every=4, sample_every=2)


@dataclass(frozen=True)
class State:
    """What the process has at a step."""

    memory_mib: float
    open_files: int
    threads: int
    tensors: int


NAMES = {"memory_mib": "memory, MiB", "open_files": "open files", "threads": "threads", "tensors": "tensors"}
BOUNDS = {name: MOST_MEMORY if name == "memory_mib" else 0.0 for name in NAMES}


def state() -> State:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return State(
        memory_mib=pages * os.sysconf("SC_PAGE_SIZE") / common.MIB,
        open_files=sum(1 for _ in Path("/proc/self/fd").iterdir()) - 1,  # without the one it is listed through
        threads=sum(1 for _ in Path("/proc/self/task").iterdir()),
        tensors=sum(issubclass(type(each), Tensor) for each in gc.get_objects()),
    )


class Watch(Silent):
    """Notes the state every so many steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.steps: list[int] = []
        self.states: list[State] = []

    def on_step(self, step: int, losses: Mapping[str, float]) -> None:
        if step % self.every == 0:
            self.steps.append(step)
            self.states.append(state())


def growth(values: Sequence[float]) -> float:
    """Median of the last quarter minus that of the second."""
    quarter = len(values) // 4
    return statistics.median(values[-quarter:]) - statistics.median(values[quarter : 2 * quarter])


def vectors(folder: Path) -> tuple[MultiDomainDataset, ModelConfig | None, int]:
    return load_dataset("colored-digits"), None, 64


def images(folder: Path) -> tuple[MultiDomainDataset, ModelConfig | None, int]:
    """Noise of three domains, each with its own brightness, in four classes; JPEG files of 48 by 40 pixels."""
    generator = np.random.default_rng(0)
    for domain in range(3):
        for label in range(4):
            place = folder / "images" / f"domain {domain}" / f"class {label}"
            place.mkdir(parents=True)
            for number in range(50):
                pixels = generator.integers(60 * domain, 60 * domain + 120, (40, 48, 3), dtype=np.uint8)
                pixels[10 * label : 10 * label + 10] //= 2
                Image.fromarray(pixels).save(place / f"{number}.jpg")
    dataset = image_dataset(folder / "images", image_size=32, cache_folder=folder / "cache")
    return dataset, backbone_config("test_resnet", weights=None), 8


RUNS: Mapping[str, Callable[[Path], tuple[MultiDomainDataset, ModelConfig | None, int]]] = {
    "vectors": vectors,
    "images": images,
}


def soak(name: str, size: Size) -> dict[str, Any]:
    watch = Watch(size.sample_every)
    with tempfile.TemporaryDirectory() as scratch:
        dataset, model, batch_size = RUNS[name](Path(scratch))
        config = RunConfig.for_dataset(
            dataset,
            "fishr",
            steps=size.steps,
            test_domains=dataset.trainable_domains[-1:],
            hparams={"batch_size": batch_size, "switch_on": 0.1},
            model=model,
            checkpoint_every=size.checkpoint_every,
            select=True,
        )
        began = time.perf_counter()
        train(config, dataset, Path(scratch) / "run", device="cpu", observer=watch)
        seconds = time.perf_counter() - began
    series = {name: [asdict(each)[name] for each in watch.states] for name in NAMES}
    return {
        "config": {
            "domains": len(dataset.trainable_domains) - 1,
            "batch_size": batch_size,
            "model": config.model.featurizer,
            "checkpoint_every": size.checkpoint_every,
        },
        "seconds": seconds,
        "step": watch.steps,
        "series": series,
        "growth": {name: growth(values) for name, values in series.items()},
    }


def goals(results: Mapping[str, Any]) -> list[common.Goal]:
    return [
        common.Goal(f"{run}: growth of {NAMES[name]}, over half of the steps", bound, False, result["growth"][name])
        for run, result in results.items()
        for name, bound in BOUNDS.items()
    ]


def table(results: Mapping[str, Any]) -> str:
    rows = []
    for run, result in results.items():
        for name, title in NAMES.items():
            values = result["series"][name]
            cells = [values[0], statistics.median(values[len(values) // 4 : len(values) // 2]), values[-1], max(values)]
            decimals = 1 if name == "memory_mib" else 0
            rows.append([f"{run}, {result['step'][-1]:,} steps", title, *(f"{cell:.{decimals}f}" for cell in cells)])
    header = ["run", "", "at first", "second quarter", "at last", "most"]
    return f"{markdown_table(header, rows)}\n\n![over the steps](soak.svg)"


def figure(results: Mapping[str, Any]) -> go.Figure:
    titles = [f"{run}: {NAMES[name]}" for run in results for name in NAMES]
    drawn = make_subplots(len(results), len(NAMES), subplot_titles=titles, vertical_spacing=0.16)
    for row, result in enumerate(results.values(), 1):
        for column, name in enumerate(NAMES, 1):
            line = go.Scatter(x=result["step"], y=result["series"][name], line={"color": PALETTE[0], "width": 1.5})
            drawn.add_trace(line, row, column)
    drawn.update_yaxes(rangemode="tozero")
    drawn.update_xaxes(title_text="step", row=len(results))
    return drawn.update_layout(
        template="plotly_white", showlegend=False, width=1300, height=300 * len(results), margin={"t": 40}
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=common.RESULTS, help="folder of the results (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that the script works")
    arguments = parser.parse_args(argv)
    arguments.repeats = 1
    results = {}
    for name in RUNS:
        common.progress.print(f"{name}: training")
        results[name] = soak(name, QUICK if arguments.quick else FULL)
        common.progress.print(f"{name}: {results[name]['seconds']:.0f} s, growth {results[name]['growth']}")
    packages = ["torch", "timm", "opencv-python-headless", "numpy", "fishr"]
    setup = common.describe_setup(arguments, packages, METHOD)
    common.write_results(arguments.output, "soak", setup, results, goals(results), table(results))
    write_images(arguments.output, {"soak": figure(results)}, ["svg"])


if __name__ == "__main__":
    main()
