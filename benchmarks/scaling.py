"""How time and memory of the Fishr penalty grow with domains, classes, samples and features.

One dimension grows at a time, the others stay at a base. On a GPU where there is one, else on the CPU.
"""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler writes to stderr whenever it starts

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import common  # sets torch's allocator up: before torch
import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fishr.devices import torch_device
from fishr.functional.variance import ACCELERATOR_ELEMENTS, CHUNK_ELEMENTS, CHUNK_ROWS
from fishr.nn import FishrPenalty
from fishr.reports.figures import LOGARITHMIC, write_images
from fishr.reports.palette import PALETTE
from fishr.reports.tables import markdown_table

METHOD = f"""A call is the penalty under cross-entropy with its moving average, and its gradient with respect to
features and logits, float32; the network and the head before it are not in it. Time: median over the repeats after two
warm-up rounds; every round makes one call of each size, of all four dimensions, in turning order, in one process.
Exponent: slope of log time over log size by least squares, over the sizes above the geometric middle of their range,
where fixed costs weigh least; in each round, then median and quartiles over rounds. Memory: the most bytes that lie
allocated at once in a call, beyond those before it; on the CPU of all allocations and releases by torch's allocator, as
its profiler tells them, so nothing is estimated, but the buffers inside matrix products are not in it; on a GPU
torch.cuda.max_memory_allocated. Formula: predicted_bytes in scaling.py, read off the code. Equal domains with at most
{CHUNK_ELEMENTS:,} feature entries in all, {ACCELERATOR_ELEMENTS:,} on a GPU, are computed at once, in one operation;
others one after the other, on the CPU in chunks that fit into the cache: the curves have a step there."""

MOST_EXPONENT = 1.1
MOST_DEVIATION = 0.01
BYTES = 4


@dataclass(frozen=True)
class Shape:
    """A batch and its head; ``samples`` are those of each domain."""

    domains: int = 4
    classes: int = 65
    samples: int = 32
    features: int = 2048

    def __str__(self) -> str:
        return f"{self.domains} domains of {self.samples} samples, {self.features} features, {self.classes} classes"


@dataclass(frozen=True)
class Plan:
    """A base, and the sizes of each dimension, ascending."""

    base: Shape
    sizes: Mapping[str, Sequence[int]]

    def shapes(self) -> dict[tuple[str, int], Shape]:
        return {
            (dimension, size): replace(self.base, **{dimension: size})
            for dimension, sizes in self.sizes.items()
            for size in sizes
        }


FULL = Plan(
    Shape(),
    {
        "domains": (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64),
        "classes": (2, 4, 8, 16, 32, 64, 128, 256, 512, 1000),
        "samples": (8, 16, 32, 64, 128, 256, 512, 1024),
        "features": (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
    },
)
QUICK = Plan(Shape(2, 3, 4, 8), dict.fromkeys(FULL.sizes, (2, 4, 8, 16)))


def one_call(shape: Shape, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """The work that is measured."""
    generator = torch.Generator().manual_seed(0)
    num_samples, sizes = shape.domains * shape.samples, (shape.samples,) * shape.domains
    features = torch.randn(num_samples, shape.features, generator=generator).relu().to(device).requires_grad_()
    logits = torch.randn(num_samples, shape.classes, generator=generator).to(device).requires_grad_()
    targets = torch.randint(shape.classes, (num_samples,), generator=generator).to(device)
    head = torch.nn.Linear(shape.features, shape.classes, device=device)
    penalty = FishrPenalty(head, shape.domains)

    def call() -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad(penalty(features, logits, targets, sizes), [features, logits])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return gradients

    return call


def at_once(shape: Shape, device: torch.device) -> bool:
    """Whether all domains are computed in one operation."""
    most = CHUNK_ELEMENTS if device.type == "cpu" else ACCELERATOR_ELEMENTS
    return shape.domains * shape.samples * shape.features <= most


def predicted_bytes(shape: Shape, device: torch.device) -> int:
    """Peak of one call, of E domains with n samples each, N = E·n, c classes, d features, D = d + 1 with the bias.

    A statistic of the head's gradients has V = E·c·D entries; the moving average keeps one of them between calls, which
    is not in the peak. Alive at once are, in entries:

    At once (:mod:`fishr.functional.cross_entropy_penalty`),
        forward: 5V + N·D + 2N·c. Scaled history, variances, means, differences, squares; H; probabilities, residuals.
        backward: 4V + 2N·D + 4N·c. Means, differences, ∂L/∂v, means∘∂L/∂v; H and its gradient; probabilities,
        residuals, scaled residuals, their gradient. Or 3V + 3N·D + 5N·c: H∘H or the gradient that is handed on, in
        place of means∘∂L/∂v.

    One after the other, ρ rows at a time (:mod:`fishr.functional.variance`; on a GPU ρ = n),
        forward: 4V + V/E + 2N·c. Variances, means, moving average, differences, mean over domains; probabilities,
        residuals (on a GPU once more, with a mask).
        backward: 3V + 2V/E + N·d + 3N·c + 2ρ·d + ρ·c. Means, ∂L/∂v, zeros for the gradient of the means; means∘∂L/∂v
        of two domains; gradients of features and residuals; scratch of a chunk.
    """
    n_e, c, d, on_cpu = shape.samples, shape.classes, shape.features, device.type == "cpu"
    n, of_domain = shape.domains * n_e, c * (d + 1)
    v = shape.domains * of_domain
    if at_once(shape, device):
        forward = 5 * v + n * (d + 1) + 2 * n * c
        backward = max(4 * v + 2 * n * (d + 1) + 4 * n * c, 3 * v + 3 * n * (d + 1) + 5 * n * c)
    else:
        forward = 4 * v + of_domain + (2 if on_cpu else 3) * n * c
        rows = min(n_e, max(CHUNK_ROWS, CHUNK_ELEMENTS // d)) if on_cpu else n_e
        backward = 3 * v + 2 * of_domain + n * d + 3 * n * c + 2 * rows * d + rows * c
    return BYTES * max(forward, backward)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes allocated at once during a call, beyond those before it."""
    call()  # what is allocated once
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert sum(changes) == 0  # every allocation was seen, and its release
    return int(np.cumsum(changes).max())


def upper(sizes: Sequence[int]) -> list[int]:
    """Sizes above the geometric middle of their range."""
    return [size for size in sizes if size > math.sqrt(sizes[0] * sizes[-1])]


def power_law(sizes: Sequence[int], values: Sequence[float]) -> tuple[float, float]:
    """Exponent p and factor a of a·x^p by least squares of the logarithms."""
    exponent, log_factor = np.polyfit(np.log(sizes), np.log(values), 1)
    return float(exponent), math.exp(log_factor)


def fit(seconds: Mapping[int, Sequence[float]]) -> dict[str, Any]:
    """The growth of the time with a dimension, over the upper sizes."""
    sizes = upper(list(seconds))
    rounds = zip(*(seconds[size] for size in sizes), strict=True)
    exponents = [power_law(sizes, of_round)[0] for of_round in rounds]
    medians = [statistics.median(seconds[size]) for size in sizes]
    exponent, factor = power_law(sizes, medians)
    residuals = np.log(medians) - np.log([factor * size**exponent for size in sizes])
    return {
        "sizes": sizes,
        "exponent": common.spread(exponents),
        "of_medians": {"exponent": exponent, "factor": factor},
        "r_squared": 1 - float(np.var(residuals) / np.var(np.log(medians))),
    }


def measure(plan: Plan, device: torch.device, repeats: int) -> dict[str, Any]:
    shapes = plan.shapes()
    calls = {key: one_call(shape, device) for key, shape in shapes.items()}
    common.progress.print(f"{len(calls)} sizes on {device}: memory")
    peaks = {key: peak_bytes(call, device) for key, call in calls.items()}
    common.progress.print(f"{len(calls)} sizes on {device}: times")
    keys = {f"{dimension} {size}": (dimension, size) for dimension, size in shapes}
    timed = common.time_alternating({name: calls[key] for name, key in keys.items()}, repeats=repeats)
    results: dict[str, Any] = {}
    for dimension, sizes in plan.sizes.items():
        seconds = {size: timed[f"{dimension} {size}"] for size in sizes}
        results[dimension] = {
            "points": [
                {
                    "size": size,
                    "seconds": common.spread(seconds[size]),
                    "bytes": peaks[dimension, size],
                    "predicted_bytes": predicted_bytes(shapes[dimension, size], device),
                    "at_once": at_once(shapes[dimension, size], device),
                }
                for size in sizes
            ],
            "fit": fit(seconds),
        }
    return results


def deviation(point: Mapping[str, Any]) -> float:
    """Of the memory from the formula, relative."""
    ratio: float = point["bytes"] / point["predicted_bytes"]
    return abs(ratio - 1)


def goals(results: Mapping[str, Any]) -> list[common.Goal]:
    growth = [
        common.Goal(f"{dimension}: exponent of the time", MOST_EXPONENT, False, of["fit"]["exponent"]["median"])
        for dimension, of in results.items()
    ]
    worst = max(deviation(point) for of in results.values() for point in of["points"])
    return [*growth, common.Goal("memory: largest deviation from the formula", MOST_DEVIATION, False, worst)]


def table(results: Mapping[str, Any], base: Shape, device: str, name: str) -> str:
    fits = []
    for dimension, of in results.items():
        found, points = of["fit"], of["points"]
        exponent = found["exponent"]
        fits.append(
            [
                f"{dimension}, {points[0]['size']:,} to {points[-1]['size']:,}",
                f"{found['sizes'][0]:,} to {found['sizes'][-1]:,}",
                f"{exponent['median']:.2f}",
                f"{exponent['q1']:.2f} to {exponent['q3']:.2f}",
                f"{found['r_squared']:.3f}",
                f"{max(map(deviation, points)):.2%}",
            ]
        )
    rows = [
        [
            f"{dimension} {point['size']:,}",
            "at once" if point["at_once"] else "in turn",
            f"{point['seconds']['median'] * 1e3:.2f}",
            f"{point['seconds']['q1'] * 1e3:.2f} to {point['seconds']['q3'] * 1e3:.2f}",
            f"{point['bytes'] / common.MIB:.2f}",
            f"{point['predicted_bytes'] / common.MIB:.2f}",
        ]
        for dimension, of in results.items()
        for point in of["points"]
    ]
    header = ["grows", "fitted", "exponent of the time", "quartiles", "R²", "memory from formula, at most"]
    details = ["size", "domains", "time, ms", "quartiles", "memory, MiB", "formula, MiB"]
    return "\n\n".join(
        [
            f"On {device}. The others stay at {base}.",
            markdown_table(header, fits),
            f"![over each dimension]({name}.svg)",
            markdown_table(details, rows),
        ]
    )


def figure(results: Mapping[str, Any], title: str) -> go.Figure:
    """Time and memory over each dimension; both axes logarithmic."""
    titles = [
        f"{dimension}: time ∝ size<sup>{of['fit']['exponent']['median']:.2f}</sup>" for dimension, of in results.items()
    ]
    drawn = make_subplots(2, 2, subplot_titles=titles, vertical_spacing=0.12)
    of_time, of_memory = PALETTE[:2]
    for index, (dimension, of) in enumerate(results.items()):
        points, law = of["points"], of["fit"]["of_medians"]
        place = {"row": index // 2 + 1, "col": index % 2 + 1}
        seconds = [point["seconds"] for point in points]
        milliseconds = [1e3 * each["median"] for each in seconds]
        sizes = [point["size"] for point in points]
        error = {
            "array": [1e3 * (each["q3"] - each["median"]) for each in seconds],
            "arrayminus": [1e3 * (each["median"] - each["q1"]) for each in seconds],
            "thickness": 1,
        }
        fitted = of["fit"]["sizes"]
        traces = {
            "time, ms": {"x": sizes, "y": milliseconds, "error_y": error, "mode": "markers", "marker_color": of_time},
            "fitted to the upper half": {
                "x": fitted,
                "y": [1e3 * law["factor"] * size ** law["exponent"] for size in fitted],
                "mode": "lines",
                "line_color": of_time,
            },
            "memory, MiB": {
                "x": sizes,
                "y": [point["bytes"] / common.MIB for point in points],
                "mode": "markers",
                "marker": {"color": of_memory, "symbol": "square"},
            },
            "formula": {
                "x": sizes,
                "y": [point["predicted_bytes"] / common.MIB for point in points],
                "mode": "lines",
                "line": {"color": of_memory, "dash": "dash"},
            },
        }
        for name, trace in traces.items():
            drawn.add_trace(go.Scatter(**trace, name=name, legendgroup=name, showlegend=index == 0), **place)
        together = [point["size"] for point in points if point["at_once"]]
        if len(together) < len(points):
            drawn.add_vline(together[-1], line={"dash": "dot", "width": 1}, **place)
        drawn.update_xaxes(title_text=dimension, **place)
    drawn.update_xaxes(type="log", dtick="D2", tickformat="~s")
    drawn.update_yaxes(LOGARITHMIC)
    drawn.update_yaxes(title_text="ms, MiB", col=1)
    return drawn.update_layout(
        title_text=f"{title}<br>up to the dotted line all domains at once, beyond it one after the other",
        template="plotly_white",
        width=1000,
        height=1000,
        margin={"t": 120},
        legend={"orientation": "h", "yanchor": "top", "y": -0.08},
    )


def main(argv: Sequence[str] | None = None) -> None:
    arguments: argparse.Namespace = common.argument_parser(__doc__, repeats=40).parse_args(argv)
    plan = QUICK if arguments.quick else FULL
    device = torch_device("auto")
    if device.type == "mps":  # which does not tell its peak
        device = torch.device("cpu")
    on_gpu = device.type == "cuda"
    title = torch.cuda.get_device_name(device) if on_gpu else "the CPU"
    dimensions = measure(plan, device, arguments.repeats)
    setup = common.describe_setup(arguments, ["torch", "numpy", "plotly", "fishr"], METHOD)
    results = {"device": title, "base": asdict(plan.base), "dimensions": dimensions}
    name = "scaling_gpu" if on_gpu else "scaling"
    text = table(dimensions, plan.base, title, name)
    common.write_results(arguments.output, name, setup, results, goals(dimensions), text)
    drawn = figure(dimensions, f"Fishr penalty and its gradient on {title}; at {plan.base}")
    write_images(arguments.output, {name: drawn}, ["svg"])


if __name__ == "__main__":
    main()
