"""The Fishr penalty and its gradient: fishr's closed form against BackPACK and torch.func.

Every side starts from the same features (a leaf) and the same linear head, computes the penalty without moving
average, and its gradient with respect to the features and the head.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common  # sets torch's allocator up: before torch
import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad, Variance
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fishr.functional.penalty import Reduction
from fishr.nn import FishrPenalty
from fishr.reports.tables import markdown_table

METHOD = """Time: median over the repeats after two warm-up rounds; every round runs all sides once, in turning order,
in one process; ratios are medians of the ratios within a round. Memory: each side in a fresh process; after a call with
few classes, which loads its kernels, and a trim of the heap, the growth of the resident set during one call at full
size: VmHWM, reset through /proc/self/clear_refs, minus VmRSS just before. Difference: largest difference to fishr
over the largest entry of fishr, for the value and for each gradient."""

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    """A head and its batch; one class is binary cross-entropy and the summed penalty of the Colored MNIST script."""

    domains: int
    batch: int
    classes: int
    features: int

    def __str__(self) -> str:
        return f"{self.domains}x{self.batch}x{self.classes}x{self.features}"

    @property
    def quick(self) -> "Shape":
        return replace(self, batch=8, classes=min(self.classes, 5), features=16)

    @property
    def few_classes(self) -> "Shape":
        """Small, but computed by the same kernels: which ones depends on the number of features in the batch."""
        return replace(self, batch=min(self.batch, 32), classes=min(self.classes, 5))


HEADS: Mapping[str, Shape] = {
    "PACS": Shape(3, 32, 7, 2048),
    "OfficeHome": Shape(3, 32, 65, 2048),
    "DomainNet": Shape(5, 32, 345, 2048),
    "ColoredMNIST": Shape(2, 25_000, 1, 390),
}
TIME_GOALS = {"PACS": 8, "OfficeHome": 20, "DomainNet": 60, "ColoredMNIST": 6}
MEMORY_GOALS = {"DomainNet": 20}


class Problem:
    """The tensors of one side, the same values for every side: sides share none, since BackPACK alters its head."""

    def __init__(self, shape: Shape, device: torch.device = CPU) -> None:
        generator = torch.Generator().manual_seed(0)
        self.sizes = [shape.batch] * shape.domains
        num_samples = sum(self.sizes)
        # Domains of different scales: were they alike, the penalty would be what is left of a cancellation.
        scales = torch.repeat_interleave(1 + 0.1 * torch.arange(shape.domains), shape.batch).unsqueeze(1)
        features = torch.randn(num_samples, shape.features, generator=generator).relu() * scales
        self.features = features.to(device).requires_grad_()
        self.head = nn.Linear(shape.features, shape.classes)
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.normal_(std=shape.features**-0.5, generator=generator)
        self.head.to(device)
        self.binary = shape.classes == 1
        self.targets = torch.randint(max(2, shape.classes), (num_samples,), generator=generator).to(device)
        if self.binary:
            self.targets = self.targets.unsqueeze(1).float()
        self.reduction: Reduction = "sum" if self.binary else "mean"

    def loss(self, reduction: str = "mean") -> nn.Module:
        """Summed, so that the gradient of a sample is that of its own loss."""
        return nn.BCEWithLogitsLoss(reduction=reduction) if self.binary else nn.CrossEntropyLoss(reduction=reduction)


Penalty = Callable[[], Tensor]


def fishr_penalty(problem: Problem) -> Penalty:
    penalty = FishrPenalty(problem.head, len(problem.sizes), loss=problem.loss(), ema=0.0, reduction=problem.reduction)

    def value() -> Tensor:
        result: Tensor = penalty(problem.features, problem.head(problem.features), problem.targets, problem.sizes)
        return result

    return value


def backpack_penalty(problem: Problem) -> Penalty:
    """BackPACK's BatchGrad, as the published code uses it, with the one change that current versions need.

    The published code asks for ``loss.backward(inputs=<head parameters>, create_graph=True)``. Since BackPACK 1.4 the
    extensions run in PyTorch's full backward hook, which fires only when the gradient of the module's *input* is
    asked for: that call now leaves no ``grad_batch`` (f-dangel/backpack issue 233). So the gradient of the
    features is asked for, and nothing else: BackPACK forms ``grad_batch`` from the head's input and output gradient,
    which makes this the least work that gives it. ``autograd.grad`` in place of ``backward`` keeps graphs out of
    ``.grad``. The copies of ``grad_batch`` that the published code makes are left out, in BackPACK's favour.
    """
    head, loss = extend(problem.head), extend(problem.loss("sum"))

    def value() -> Tensor:
        total = loss(head(problem.features), problem.targets)
        with backpack(BatchGrad()):
            torch.autograd.grad(total, problem.features, create_graph=True)
        return penalty_of_gradients(take(head, "grad_batch"), problem)

    return value


def backpack_variance_penalty(problem: Problem) -> Penalty:
    """BackPACK's Variance, domain by domain: what the published code does not use but could have.

    For a linear layer it too is formed without per-sample gradients. It needs a forward and a backward pass for every
    domain, since it knows only one batch.
    """
    head, loss = extend(problem.head), extend(problem.loss("sum"))

    def value() -> Tensor:
        variances = []
        split = (torch.split(tensor, problem.sizes) for tensor in (problem.features, problem.targets))
        for features, targets in zip(*split, strict=True):
            total = loss(head(features), targets)
            with backpack(Variance()):
                torch.autograd.grad(total, features, create_graph=True)
            variances.append(flatten(take(head, "variance")))
        return distance(variances, problem.reduction)

    return value


def torch_func_penalty(problem: Problem) -> Penalty:
    loss = problem.loss("sum")

    def sample_loss(parameters: dict[str, Tensor], feature: Tensor, target: Tensor) -> Tensor:
        logits = functional_call(problem.head, parameters, (feature.unsqueeze(0),))
        result: Tensor = loss(logits, target.unsqueeze(0))
        return result

    per_sample = vmap(grad(sample_loss), in_dims=(None, 0, 0))

    def value() -> Tensor:
        gradients = per_sample(dict(problem.head.named_parameters()), problem.features, problem.targets)
        return penalty_of_gradients(list(gradients.values()), problem)

    return value


SIDES: Mapping[str, Callable[[Problem], Penalty]] = {
    "fishr": fishr_penalty,
    "backpack": backpack_penalty,
    "backpack-variance": backpack_variance_penalty,
    "torch.func": torch_func_penalty,
}


def penalty_of_gradients(gradients: Sequence[Tensor], problem: Problem) -> Tensor:
    """From per-sample gradients ``[sample, ...]`` of weight and bias; twice as fast on a CPU as torch.var."""
    domains = zip(*(torch.split(gradient, problem.sizes) for gradient in gradients), strict=True)
    variances = [flatten([(part - part.mean(0)).square().mean(0) for part in parts]) for parts in domains]
    return distance(variances, problem.reduction)


def distance(variances: Sequence[Tensor], reduction: Reduction) -> Tensor:
    stacked = torch.stack(list(variances))
    squared = (stacked - stacked.mean(0)).square()
    return squared.mean() if reduction == "mean" else squared.sum()


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def take(head: nn.Module, name: str) -> list[Tensor]:
    """What BackPACK left on the parameters; removed there, or the whole graph would live until the next call."""
    taken = []
    for parameter in head.parameters():
        taken.append(getattr(parameter, name))
        delattr(parameter, name)
    return taken


def value_and_gradients(side: str, shape: Shape, device: torch.device = CPU) -> Callable[[], tuple[Tensor, ...]]:
    """The work that is measured; what happens once, before the first step of a training, happens here."""
    problem = Problem(shape, device)
    penalty = SIDES[side](problem)

    def call() -> tuple[Tensor, ...]:
        value = penalty()
        return value.detach(), *torch.autograd.grad(value, [problem.features, *problem.head.parameters()])

    return call


def differences(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float]:
    errors = [float((a - e).abs().max() / e.abs().max()) for a, e in zip(actual, expected, strict=True)]
    return {"value": errors[0], "gradients": max(errors[1:])}


def memory_growth(side: str, shape: Shape) -> int:
    """Bytes by which the resident set grows in one call; Linux only."""
    value_and_gradients(side, shape.few_classes)()
    call = value_and_gradients(side, shape)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status, such as VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def memory_in_fresh_process(side: str, head: str, *, quick: bool, limit: float) -> dict[str, Any]:
    """Memory of a side, or why there is none; what fails here is not timed either."""
    command = [sys.executable, __file__, "--memory-of", head, side, *(["--quick"] if quick else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"status": f"too slow: not done within {limit:g} s"}
    if done.returncode < 0:
        return {"status": f"killed by signal {-done.returncode}, most likely out of memory"}
    if done.returncode > 0:
        return {"status": "failed: " + (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return {"status": "ok", "memory_bytes": json.loads(done.stdout)}


def measure(head: str, sides: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Memory, time and agreement of all sides on one head."""
    shape = HEADS[head].quick if arguments.quick else HEADS[head]
    outcomes = {}
    for side in sides:
        common.progress.print(f"{head} {shape}: memory of {side}")
        outcomes[side] = memory_in_fresh_process(side, head, quick=arguments.quick, limit=arguments.limit)
    common.progress.print(f"{head} {shape}: times")
    calls = {side: value_and_gradients(side, shape) for side in sides if outcomes[side]["status"] == "ok"}
    if "fishr" not in calls:
        raise RuntimeError(f"nothing to compare with: fishr on {head}: {outcomes['fishr']['status']}")
    seconds = common.time_alternating(calls, repeats=arguments.repeats)
    expected, memory = calls["fishr"](), outcomes["fishr"]["memory_bytes"]
    for side, call in calls.items():
        outcomes[side] |= {
            "seconds": common.spread(seconds[side]),
            "time_ratio": common.spread(common.paired_ratios(seconds[side], seconds["fishr"])),
            "memory_ratio": outcomes[side]["memory_bytes"] / memory if memory else None,
            "difference": differences(call(), expected),
        }
    return {"shape": str(shape), "sides": outcomes}


def goals(results: Mapping[str, Any]) -> list[common.Goal]:
    judged = []
    for measure_name, bounds in (("time", TIME_GOALS), ("memory", MEMORY_GOALS)):
        for head, bound in bounds.items():
            outcome = results.get(head, {"sides": {}})["sides"].get("backpack", {})
            ratio = outcome.get(f"{measure_name}_ratio")
            measured = ratio["median"] if isinstance(ratio, dict) else ratio
            judged.append(common.Goal(f"{head}: {measure_name} of BackPACK over ours", bound, True, measured))
    return judged


def table(results: Mapping[str, Any]) -> str:
    header = ["head [domains x batch x classes x features]", "side", "time, ms", "of ours (quartiles)"]
    header += ["memory, MiB", "of ours", "difference: value", "gradients"]
    rows = []
    for head, result in results.items():
        for side, outcome in result["sides"].items():
            row = [f"{head} {result['shape']}", side]
            if outcome["status"] == "ok":
                ratio, difference = outcome["time_ratio"], outcome["difference"]
                row += [
                    f"{outcome['seconds']['median'] * 1e3:.2f}",
                    f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})",
                    f"{outcome['memory_bytes'] / common.MIB:.1f}",
                    f"{outcome['memory_ratio']:.2f}" if outcome["memory_ratio"] else "-",
                    f"{difference['value']:.0e}",
                    f"{difference['gradients']:.0e}",
                ]
            else:
                row += [outcome["status"]] + ["-"] * 5
            rows.append(row)
    return markdown_table(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.argument_parser(__doc__, repeats=20)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS), help="default: all")
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=list(SIDES), help="default: all; fishr, the reference, always runs"
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=300,
        help="seconds that a side has for one call in its own process (default: %(default)s)",
    )
    parser.add_argument("--memory-of", nargs=2, metavar=("HEAD", "SIDE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.memory_of:
        head, side = arguments.memory_of
        sys.stdout.write(json.dumps(memory_growth(side, HEADS[head].quick if arguments.quick else HEADS[head])))
        return
    sides = list(dict.fromkeys(["fishr", *arguments.sides]))
    results = {head: measure(head, sides, arguments) for head in arguments.heads}
    setup = common.describe_setup(arguments, ["torch", "fishr", "backpack-for-pytorch"], METHOD)
    common.write_results(arguments.output, "penalty", setup, results, goals(results), table(results))


if __name__ == "__main__":
    main()
