"""Training on one GPU: images per second and memory of ERM, of Fishr, and of Fishr with BackPACK; the loop with real
images over the same on synthetic input; a compiled network; the penalty of the DomainNet head.

Without a GPU it says so and measures the CPU, with fewer images.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import common  # sets torch's allocator up: before torch
import penalty
import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad
from torch import Tensor, nn

from fishr.algorithms import ERM, Algorithm, Fishr
from fishr.algorithms.fishr import FishrConfig
from fishr.data import BatchSampler, DomainBatch, load_dataset
from fishr.data.mnist import data_root
from fishr.functional import variance_penalty
from fishr.models.backbone import lay_weights
from fishr.models.build import ModelConfig, build_model
from fishr.reports.tables import markdown_table
from fishr.training.compilation import compile_featurizer
from fishr.training.config import Precision
from fishr.training.ranks import Ranks

METHOD = """A step is the algorithm's training_step as fishr train makes it: its network, weights drawn at random, batch
norm frozen, Fishr's penalty acting, Adam. Synthetic input: one batch that lies on the device. Real input: PACS from the
warm cache, crop, flip and resize on the host, color on an accelerator, transfer included. Timed are several steps in a
row until the device is done, after one that is not timed; in every round all sides run one after the other, in turning
order, and ratios are medians of the ratios within a round, after two warm-up rounds. Memory of a step: each side in a
fresh process, on a GPU the most that was allocated at once, on a CPU the growth of the resident set (VmHWM minus VmRSS
before the network). The head: value and gradients of the penalty alone, as in penalty.py; memory is what a call
adds."""

NUM_CLASSES, NUM_DOMAINS = 7, 3
STEPS_FOR_MEMORY = 3
HEAD_SIDES = ("fishr", "backpack")


@dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
        backbone: An architecture of timm.
        image_size: Rows and columns.
        per_domain: Images of each of three domains in a batch.
        steps: Steps that are timed in a row.
        precision: That of the run.
    """

    backbone: str
    image_size: int
    per_domain: int
    steps: int
    precision: Precision

    def __str__(self) -> str:
        return (
            f"{self.backbone}, {NUM_DOMAINS}x{self.per_domain} images of {self.image_size}x{self.image_size}, "
            f"{NUM_CLASSES} classes, {self.precision}"
        )


ON_GPU = Size("resnet50", 224, 32, 30, "bf16-mixed")
ON_CPU = Size("resnet50", 224, 8, 1, "32")
QUICK = Size("test_resnet", 32, 2, 2, "32")


class BackPACKFishr(Fishr):
    """Fishr as published: variances from per-sample gradients of the head, which BackPACK computes.

    How BackPACK is called, and why not quite as published, stands at ``backpack_penalty`` in penalty.py.
    """

    def setup(self) -> None:
        super().setup()
        extend(self.classifier)
        self.sum_of_losses = extend(nn.CrossEntropyLoss(reduction="sum"))

    def risk_and_penalty(self, features: Tensor, batch: DomainBatch) -> tuple[Tensor, Tensor]:
        features = features.to(self.classifier.weight.dtype)
        total = self.sum_of_losses(self.logits(features), batch.targets)
        with backpack(BatchGrad()):
            torch.autograd.grad(total, features, create_graph=True)
        weight, bias = penalty.take(self.classifier, "grad_batch")
        gradients = batch.split(torch.cat([weight, bias.unsqueeze(2)], dim=2))
        variances = torch.stack([(part - part.mean(0)).square().mean(0) for part in gradients])
        return total / len(batch.targets), variance_penalty(self.penalty.average(variances))


@dataclass(frozen=True)
class Side:
    """One way to train.

    Attributes:
        title: How it is called in the table.
        algorithm: The class.
        over: The side that it is compared with.
        real: Whether it reads images.
        compiled: Whether its featurizer is compiled.
    """

    title: str
    algorithm: type[Algorithm]
    over: str
    real: bool = False
    compiled: bool = False


SIDES: Mapping[str, Side] = {
    "erm": Side("ERM", ERM, "erm"),
    "fishr": Side("Fishr", Fishr, "erm"),
    "backpack": Side("Fishr, BackPACK", BackPACKFishr, "erm"),
    "real": Side("Fishr, real input", Fishr, "fishr", real=True),
    "compiled": Side("Fishr, compiled", Fishr, "fishr", compiled=True),
}
IN_MEMORY = ("erm", "fishr", "backpack")
"""Sides whose memory is measured."""


class Training:
    """A training of one side that goes on and on."""

    def __init__(self, side: Side, size: Size, ranks: Ranks, next_batch: Callable[[int], DomainBatch]) -> None:
        torch.manual_seed(0)
        options = {"name": size.backbone, "mean": [0.5] * 3, "std": [0.2] * 3, "frozen_batch_norm": True}
        network = build_model(ModelConfig("timm", options), (3, size.image_size, size.image_size), NUM_CLASSES)
        lay_weights(network[0].to(ranks.device), ranks.device)
        config = side.algorithm.Config.default("images")
        if isinstance(config, FishrConfig):
            config = config.updated({"switch_on": 0, "reset_optimizer": False})
        self.algorithm = side.algorithm(*network, NUM_DOMAINS, config).to(ranks.device)
        self.algorithm.autocast = ranks.fabric.autocast
        if side.compiled:
            compile_featurizer(self.algorithm)
        self.optimizers = self.algorithm.configure_optimizers()
        self.next_batch, self.indices, self.device = next_batch, count(), ranks.device

    def make_steps(self, number: int) -> Tensor:
        """The loss of the last one, when the device is done."""
        for index in (next(self.indices) for _ in range(number)):
            losses = self.algorithm.training_step(self.next_batch(index), index, self.optimizers).detached()
        synchronize(self.device)
        return losses.total


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def synthetic(size: Size, device: torch.device) -> Callable[[int], DomainBatch]:
    """The same batch at every step, on the device."""
    generator = torch.Generator().manual_seed(1)
    sizes = (size.per_domain,) * NUM_DOMAINS
    shape = (sum(sizes), 3, size.image_size, size.image_size)
    inputs = torch.rand(shape, generator=generator).contiguous(memory_format=torch.channels_last)
    targets = torch.randint(NUM_CLASSES, shape[:1], generator=generator)
    batch = DomainBatch(inputs, targets, sizes).to(device)
    return lambda step: batch


def real(size: Size, device: torch.device, root: Path, subset: int | None) -> Callable[[int], DomainBatch]:
    """Batches of PACS, as fishr train reads them."""
    dataset = load_dataset("pacs", root=root, image_size=size.image_size, subset=subset)
    dataset.open()
    samples = list(dataset.domains.values())[:NUM_DOMAINS]
    sampler = BatchSampler(samples, size.per_domain, seed=0, device=device)
    return lambda step: sampler.batch(step).to(device)


def measure_steps(
    size: Size, sides: Sequence[str], device: torch.device, arguments: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Images per second of each side."""
    ranks = Ranks(device.type, size.precision)
    resident_batch = synthetic(size, device)
    trainings = {}
    for name in sides:
        next_batch = resident_batch
        if SIDES[name].real:
            subset = 20 if arguments.quick else None
            next_batch = real(size, device, data_root(arguments.data_root), subset)
        trainings[name] = Training(SIDES[name], size, ranks, next_batch)
        common.progress.print(f"{SIDES[name].title}: first step")
        trainings[name].make_steps(1)
    common.progress.print("times")
    seconds = common.time_alternating(
        {name: partial(training.make_steps, size.steps) for name, training in trainings.items()},
        repeats=arguments.repeats,
        before=lambda name: trainings[name].make_steps(1),
    )
    images = NUM_DOMAINS * size.per_domain * size.steps
    return {
        name: {
            "images_per_second": common.spread([images / value for value in values]),
            "over": SIDES[name].over,
            "time_ratio": common.spread(common.paired_ratios(values, seconds[SIDES[name].over])),
            "loss_finite": bool(torch.isfinite(trainings[name].make_steps(1))),
        }
        for name, values in seconds.items()
    }


def memory_of_steps(name: str, size: Size, device: torch.device) -> int:
    """Bytes that a training takes at most; to be called in a fresh process."""
    before = penalty.resident("VmRSS")
    training = Training(SIDES[name], size, Ranks(device.type, size.precision), synthetic(size, device))
    training.make_steps(STEPS_FOR_MEMORY)
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else penalty.resident("VmHWM") - before


def memory_in_fresh_process(name: str, *, quick: bool) -> int:
    command = [sys.executable, __file__, "--memory-of", name, *(["--quick"] if quick else [])]
    return int(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def measure_head(device: torch.device, *, quick: bool, repeats: int) -> dict[str, Any]:
    """Value and gradients of the penalty on the DomainNet head: time, and on a GPU memory."""
    shape = penalty.HEADS["DomainNet"].quick if quick else penalty.HEADS["DomainNet"]
    calls = {name: penalty.value_and_gradients(name, shape, device) for name in HEAD_SIDES}

    def job(name: str) -> Callable[[], None]:
        def call() -> None:
            calls[name]()
            synchronize(device)

        return call

    seconds = common.time_alternating({name: job(name) for name in HEAD_SIDES}, repeats=repeats)
    expected = calls["fishr"]()
    return {
        "shape": str(shape),
        "sides": {
            name: {
                "seconds": common.spread(seconds[name]),
                "time_ratio": common.spread(common.paired_ratios(seconds[name], seconds["fishr"])),
                "memory_bytes": memory_of_call(calls[name], device),
                "difference": penalty.differences(calls[name](), expected),
            }
            for name in HEAD_SIDES
        },
    }


def memory_of_call(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes of a GPU that a call adds at most; None without one (penalty.py measures the CPU's)."""
    if device.type != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def goals(results: Mapping[str, Any], *, on_gpu: bool) -> list[common.Goal]:
    """Bounds that were set for an H200; on a CPU nothing is judged."""
    steps, memory = results["steps"], results["memory"]

    def time_ratio(name: str) -> float | None:
        return steps[name]["time_ratio"]["median"] if on_gpu and name in steps else None

    over_erm = memory["fishr"] / memory["erm"] if on_gpu and {"erm", "fishr"} <= memory.keys() else None
    on_real = time_ratio("real")
    return [
        common.Goal("Fishr step over ERM step", 1.005, False, time_ratio("fishr")),
        common.Goal("memory of Fishr over ERM's", 1.002, False, over_erm),
        common.Goal("images/s on real input over synthetic", 0.9, True, None if on_real is None else 1 / on_real),
    ]


def table(results: Mapping[str, Any]) -> str:
    rows = []
    for name, of_side in results["steps"].items():
        ratio, memory = of_side["time_ratio"], results["memory"]
        taken = [f"{memory[name] / common.MIB:.0f}", f"{memory[name] / memory['erm']:.4f}"] if name in memory else []
        rows.append(
            [
                SIDES[name].title + ("" if of_side["loss_finite"] else " (its loss is not finite)"),
                f"{of_side['images_per_second']['median']:.1f}",
                f"{ratio['median']:.4f} of {SIDES[of_side['over']].title}'s",
                f"{ratio['q1']:.4f} to {ratio['q3']:.4f}",
                *(taken or ["-", "-"]),
            ]
        )
    header = ["training step", "images/s", "time", "quartiles", "memory, MiB", "of ERM's"]
    of_head = []
    for name, side in results["head"]["sides"].items():
        ratio, taken_by_call = side["time_ratio"], side["memory_bytes"]
        of_head.append(
            [
                name,
                f"{side['seconds']['median'] * 1e3:.3f}",
                f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})",
                "-" if taken_by_call is None else f"{taken_by_call / common.MIB:.1f}",
                f"{max(side['difference'].values()):.0e}",
            ]
        )
    head = markdown_table(["penalty", "ms", "of ours (quartiles)", "memory, MiB", "largest difference"], of_head)
    shape = f"The DomainNet head, domains x batch x classes x features: {results['head']['shape']}."
    return "\n\n".join([results["device"], f"{results['size']}.", markdown_table(header, rows), shape, head])


def main(argv: Sequence[str] | None = None) -> None:
    on_gpu = torch.cuda.is_available()
    parser = common.argument_parser(__doc__, repeats=20 if on_gpu else 5)
    parser.add_argument("--data-root", type=Path, help="folder with PACS (default: $FISHR_DATA, else the cache folder)")
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=list(SIDES), help="default: all; erm and fishr always run"
    )
    parser.add_argument("--memory-of", choices=IN_MEMORY, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if on_gpu else "cpu")
    size = QUICK if arguments.quick else ON_GPU if on_gpu else ON_CPU
    if arguments.memory_of:
        sys.stdout.write(json.dumps(memory_of_steps(arguments.memory_of, size, device)))
        return
    sides = [name for name in SIDES if name in ("erm", "fishr", *arguments.sides)]
    name_of_gpu = torch.cuda.get_device_name() if on_gpu else None
    measured_on = f"Measured on {name_of_gpu}." if on_gpu else "There is no GPU here: measured on the CPU."
    common.progress.print(measured_on)
    memory = {}
    for name in sides:
        if name in IN_MEMORY:
            common.progress.print(f"{SIDES[name].title}: memory")
            memory[name] = memory_in_fresh_process(name, quick=arguments.quick)
    results = {
        "device": measured_on,
        "size": str(size),
        "steps": measure_steps(size, sides, device, arguments),
        "memory": memory,
        "head": measure_head(device, quick=arguments.quick, repeats=arguments.repeats),
    }
    packages = ["torch", "timm", "lightning-fabric", "backpack-for-pytorch", "opencv-python-headless", "fishr"]
    setup = common.describe_setup(arguments, packages, METHOD)
    common.write_results(arguments.output, "gpu", setup, results, goals(results, on_gpu=on_gpu), table(results))


if __name__ == "__main__":
    main()
