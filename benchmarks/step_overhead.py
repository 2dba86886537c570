"""What Fishr adds to a whole training step: its duration over that of ERM, on the same network and batch.

The penalty acts in every step. ERM and Fishr alternate step by step in one process.
"""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import common  # sets torch's allocator up: before torch
import torch
from lightning_fabric import Fabric
from torch import nn
from torchvision.models import resnet18

from fishr.algorithms import ERM, Algorithm, Fishr
from fishr.algorithms.base import AlgorithmConfig
from fishr.algorithms.fishr import FishrConfig
from fishr.data.base import DomainBatch
from fishr.models.build import ModelConfig, build_model
from fishr.reports.tables import markdown_table
from fishr.training.config import Precision
from fishr.workflows.reproduce import setting

METHOD = """A step is the algorithm's training_step: forward, losses, backward, optimizer; making the batch is left out
(it would be the same for both). Random inputs and labels, weights not pretrained. Ratio: median of the ratios of the
Fishr step to the ERM step of the same round, after two warm-up rounds; the order within a round alternates."""


@dataclass(frozen=True)
class Workload:
    """A batch and the two algorithms that train on it."""

    batch: DomainBatch
    algorithms: Mapping[str, Algorithm]


def workload(
    batch: DomainBatch,
    network: tuple[nn.Module, nn.Linear],
    erm: AlgorithmConfig,
    fishr: FishrConfig,
    precision: Precision = "32",
) -> Workload:
    """Two algorithms that start from the same weights, in the precision that the training loop would give them."""
    fabric = Fabric(accelerator="cpu", devices=1, precision="32-true" if precision == "32" else precision)
    num_domains = len(batch.sizes)
    algorithms: dict[str, Algorithm] = {
        "erm": ERM(*copy.deepcopy(network), num_domains, erm),
        "fishr": Fishr(*copy.deepcopy(network), num_domains, fishr),
    }
    for algorithm in algorithms.values():
        algorithm.autocast = fabric.autocast
    return Workload(batch, algorithms)


def colored_mnist(precision: Precision, *, quick: bool) -> Workload:
    """The reproduction's full-batch step (fishr.workflows.colored), on random data of its shapes."""
    samples = 64 if quick else 25_000
    inputs, targets = torch.rand(2 * samples, 2, 14, 14), torch.randint(2, (2 * samples,))
    published = setting(label_flip=0.25, precision=precision)
    model = ModelConfig("mlp", {"width": 16 if quick else published.width, "depth": 2}, init="xavier")
    return workload(
        DomainBatch(inputs, targets, (samples, samples)),
        build_model(model, (2, 14, 14), 1),
        AlgorithmConfig(lr=published.lr, l2=published.l2, batch_size=None),
        FishrConfig(
            lr=published.lr,
            l2=published.l2,
            batch_size=None,
            penalty_weight=published.penalty_weight,
            switch_on=0,
            rescale=True,
            reset_optimizer=False,
            ema=0.0,
            reduction="sum",
        ),
        precision,
    )


def resnet(*, quick: bool) -> Workload:
    """A small image network with the defaults for images: 3 domains of 16 images, 7 classes."""
    per_domain, side = (2, 32) if quick else (16, 112)
    featurizer = resnet18(weights=None)
    head = nn.Linear(featurizer.fc.in_features, 7)
    featurizer.fc = nn.Identity()
    inputs, targets = torch.randn(3 * per_domain, 3, side, side), torch.randint(7, (3 * per_domain,))
    return workload(
        DomainBatch(inputs, targets, (per_domain,) * 3),
        (featurizer, head),
        AlgorithmConfig.default("images"),
        FishrConfig.default("images").updated({"switch_on": 0}),
    )


@dataclass(frozen=True)
class Case:
    title: str
    goal: float
    build: Callable[[bool], Workload]


CASES: Mapping[str, Case] = {
    "colored-mnist-32": Case(
        "Colored MNIST, 2x25000, MLP 392-390-390-1", 1.15, lambda quick: colored_mnist("32", quick=quick)
    ),
    "colored-mnist-bf16": Case("the same, bf16-mixed", 1.15, lambda quick: colored_mnist("bf16-mixed", quick=quick)),
    "resnet18": Case("ResNet-18, 3x16 images of 112x112, 7 classes", 1.01, lambda quick: resnet(quick=quick)),
}


def measure(case: Case, *, repeats: int, quick: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    load = case.build(quick)
    steps = {name: stepper(algorithm, load.batch) for name, algorithm in load.algorithms.items()}
    seconds = common.time_alternating(steps, repeats=repeats)
    return {
        "title": case.title,
        "seconds": {name: common.spread(values) for name, values in seconds.items()},
        "ratio": common.spread(common.paired_ratios(seconds["fishr"], seconds["erm"])),
        "losses_finite": all(bool(torch.isfinite(step())) for step in steps.values()),
    }


def stepper(algorithm: Algorithm, batch: DomainBatch) -> Callable[[], torch.Tensor]:
    optimizers, index = algorithm.configure_optimizers(), itertools.count()

    def step() -> torch.Tensor:
        return algorithm.training_step(batch, next(index), optimizers).total.detach()

    return step


def table(results: Mapping[str, Any]) -> str:
    header = ["training step", "ERM, ms", "Fishr, ms", "Fishr / ERM", "quartiles"]
    rows = []
    for result in results.values():
        seconds, ratio = result["seconds"], result["ratio"]
        rows.append(
            [
                result["title"] + ("" if result["losses_finite"] else " (a loss is not finite)"),
                *(f"{seconds[name]['median'] * 1e3:.1f}" for name in ("erm", "fishr")),
                f"{ratio['median']:.3f}",
                f"{ratio['q1']:.3f} to {ratio['q3']:.3f}",
            ]
        )
    published = "Published cost of Fishr over ERM, ResNet-50 on PACS: 1.027 (Rame et al., ICML 2022)."
    return markdown_table(header, rows) + "\n\n" + published


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.argument_parser(__doc__, repeats=40)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    arguments = parser.parse_args(argv)
    results = {}
    for name in arguments.cases:
        common.progress.print(f"{name}: {CASES[name].title}")
        results[name] = measure(CASES[name], repeats=arguments.repeats, quick=arguments.quick)
    goals = [
        common.Goal(f"{name}: Fishr step over ERM step", case.goal, False, results[name]["ratio"]["median"])
        if name in results
        else common.Goal(f"{name}: Fishr step over ERM step", case.goal, False, None)
        for name, case in CASES.items()
    ]
    setup = common.describe_setup(arguments, ["torch", "torchvision", "lightning-fabric", "fishr"], METHOD)
    common.write_results(arguments.output, "step_overhead", setup, results, goals, table(results))


if __name__ == "__main__":
    main()
