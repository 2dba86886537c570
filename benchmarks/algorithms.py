"""All algorithms: accuracy on held-out domains of Colored Digits, and what a training step costs.

Runs lie in ``--runs`` and continue where they were cut; ``--workers`` processes of one thread each make them. The step
costs are also written into the package, where ``fishr algorithms show`` reads them.
"""

import argparse
import json
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import common  # sets torch's allocator up: before torch
import torch

import fishr.algorithms
from fishr.algorithms import ALGORITHMS, Algorithm
from fishr.algorithms.describe import STEP_COSTS
from fishr.data import DomainBatch, load_dataset
from fishr.data.base import Kind
from fishr.errors import NonFiniteLossError
from fishr.files import write_text
from fishr.models.build import ModelConfig, build_model
from fishr.reports.comparison import comparison_table, differences
from fishr.reports.tables import markdown_table
from fishr.training import RunConfig, train
from fishr.training.loop import RunResult
from fishr.workflows.compare import hyperparameters_of_draw, titles

METHOD = """Accuracy: Colored Digits, each domain held out in turn, the library's MLP, 500 steps, batches of
64 per domain. Of each algorithm the recommended hyperparameters and three random draws of those that have a
search space (but for batch size and the weights and switch-on steps of penalties) are trained with seed 0;
the draw with the best accuracy on the out-splits of the training domains is run with the other seeds; the
last step counts; data, splits and initial weights are those of the seed. Nothing is chosen by a held-out
domain. Step costs: the recommended hyperparameters for images and for vectors, in the last tenth of a run,
where every penalty is on; a call is two steps, as adversarial training takes turns; ratio: median over
rounds, in each of which ERM and the algorithm took turns; ERM against itself shows the noise; making the
batch is left out."""

SEEDS, DRAWS, STEPS = (0, 1, 2, 3, 4), 4, 500


@dataclass(frozen=True)
class Task:
    """One algorithm with one domain held out."""

    algorithm: str
    domain: str
    runs: Path
    steps: int
    draws: int
    seeds: Sequence[int]
    subset: int | None

    def outcome(self) -> dict[str, Any]:
        """The draw chosen, and the held-out accuracy of each seed."""
        torch.set_num_threads(1)
        scores = [self.score(number) for number in range(self.draws)]
        chosen = scores.index(max(scores))
        held_out = [self.run(chosen, seed).kept.domains[self.domain]["in"].accuracy for seed in self.seeds]
        return {"chosen": chosen, "hparams": self.hparams(chosen), "validation": scores, "held_out": held_out}

    def hparams(self, number: int) -> dict[str, Any]:
        return hyperparameters_of_draw(self.algorithm, "vectors", number)

    def run(self, number: int, seed: int) -> RunResult:
        dataset = load_dataset("colored-digits", seed=seed, subset=self.subset)
        config = RunConfig.for_dataset(
            dataset,
            self.algorithm,
            steps=self.steps,
            test_domains=(self.domain,),
            hparams=self.hparams(number),
            checkpoint_every=self.steps,
            seed=seed,
            trial=seed,
        )
        return train(config, dataset, self.runs / config.hash, device="cpu")

    def score(self, number: int) -> float:
        """Validation accuracy of a draw; of one that diverged, below any."""
        try:
            splits = self.run(number, self.seeds[0]).kept.domains
        except NonFiniteLossError:
            return -1.0
        return fmean(splits[name]["out"].accuracy for name in splits if "out" in splits[name] and name != self.domain)


def accuracies(names: Sequence[str], runs: Path, workers: int, *, quick: bool) -> dict[str, dict[str, Any]]:
    domains = load_dataset("colored-digits").trainable_domains
    steps, draws, seeds, subset = (4, 2, SEEDS[:2], 30) if quick else (STEPS, DRAWS, SEEDS, None)
    tasks = [Task(name, domain, runs, steps, draws, seeds, subset) for name in names for domain in domains]
    outcomes: dict[str, dict[str, Any]] = {name: {} for name in names}
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for task, outcome in zip(tasks, pool.map(Task.outcome, tasks), strict=True):
            outcomes[task.algorithm][task.domain] = outcome
            held_out = ", ".join(f"{accuracy:.3f}" for accuracy in outcome["held_out"])
            common.progress.print(f"{task.algorithm}, {task.domain} held out: {held_out}", markup=False)
    return outcomes


@dataclass(frozen=True)
class Case:
    """A network and batches that steps are timed on."""

    title: str
    kind: Kind
    model: ModelConfig
    input_shape: tuple[int, ...]
    num_classes: int
    sizes: tuple[int, ...]
    repeats: int

    def algorithm(self, name: str) -> Algorithm:
        torch.manual_seed(0)
        cls = ALGORITHMS[name]
        network = build_model(cls.model_config(self.model), self.input_shape, self.num_classes)
        return cls(*network, len(self.sizes), cls.Config.recommended(self.kind), steps=1000)

    def batch(self) -> DomainBatch:
        torch.manual_seed(1)
        total = sum(self.sizes)
        return DomainBatch(torch.rand(total, *self.input_shape), torch.randint(self.num_classes, (total,)), self.sizes)


def cases(*, quick: bool) -> list[Case]:
    backbone = ModelConfig("timm", {"name": "mobilenetv2_100", "mean": [0.5] * 3, "std": [0.5] * 3})
    if quick:
        return [Case("MLP", "vectors", ModelConfig("mlp"), (8,), 3, (4, 4), 1)]
    return [
        Case("MLP, 3 x 64 vectors of 128, 2 classes", "vectors", ModelConfig("mlp"), (128,), 2, (64,) * 3, 100),
        Case("MobileNetV2, 3 x 16 images of 128², 7 classes", "images", backbone, (3, 128, 128), 7, (16,) * 3, 5),
    ]


class TwoSteps:
    """The next two steps of an algorithm."""

    def __init__(self, algorithm: Algorithm, batch: DomainBatch) -> None:
        self.algorithm, self.batch, self.step = algorithm.train(), batch, 0
        self.optimizers = algorithm.configure_optimizers()
        self._steps(range(3))  # what is made at the first step is of no step's cost
        self._steps(range(algorithm.switch_on_step, algorithm.switch_on_step + 1))
        self.step = 900

    def __call__(self) -> None:
        self._steps(range(self.step, self.step + 2))
        self.step += 2

    def _steps(self, steps: range) -> None:
        for step in steps:
            self.algorithm.training_step(self.batch, step, self.optimizers)


def step_costs(names: Sequence[str], *, quick: bool) -> dict[str, dict[str, float]]:
    costs: dict[str, dict[str, float]] = {name: {} for name in names}
    for case in cases(quick=quick):
        batch = case.batch()
        for name in names:
            jobs = {"erm": TwoSteps(case.algorithm("erm"), batch), "other": TwoSteps(case.algorithm(name), batch)}
            seconds = common.time_alternating(jobs, repeats=case.repeats, warm_up=1)
            costs[name][case.title] = median(common.paired_ratios(seconds["other"], seconds["erm"]))
            common.progress.print(f"{case.title}, {name}: {costs[name][case.title]:.2f}", markup=False)
    return costs


def table(outcomes: Mapping[str, Mapping[str, Any]], costs: Mapping[str, Mapping[str, float]]) -> str:
    held_out = {
        name: {domain: outcome["held_out"] for domain, outcome in of_domains.items()}
        for name, of_domains in outcomes.items()
    }
    names = titles(costs)
    rows = [[names[name], *(f"{cost:.2f}" for cost in of_cases.values())] for name, of_cases in costs.items()]
    header = ["a step, as a multiple of ERM's", *next(iter(costs.values()))]
    return f"{comparison_table(held_out, names)}\n\n{markdown_table(header, rows)}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own = [name for name in ALGORITHMS if ALGORITHMS[name].__module__.startswith("fishr.")]
    parser.add_argument("--algorithms", nargs="*", default=own, help="beside ERM (default: all)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes that train (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=common.RESULTS, help="folder of the results (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that the script works")
    arguments = parser.parse_args(argv)
    names = list(dict.fromkeys(["erm", *arguments.algorithms]))
    arguments.repeats = len(SEEDS)
    outcomes = accuracies(names, arguments.runs / "algorithms", arguments.workers, quick=arguments.quick)
    costs = step_costs(names, quick=arguments.quick)
    held_out = {name: {domain: of_domain["held_out"] for domain, of_domain in outcomes[name].items()} for name in names}
    paired = {name: asdict(value) for name, value in differences(held_out).items()}
    results = {"accuracy": outcomes, "difference_to_erm": paired, "step_costs": costs}
    setup = common.describe_setup(arguments, ["torch", "timm", "scipy", "fishr"], METHOD)
    common.write_results(arguments.output, "algorithms", setup, results, [], table(outcomes, costs))
    if not arguments.quick and names == own:
        rounded = {name: {case: round(cost, 1) for case, cost in costs[name].items()} for name in names[1:]}
        package = Path(fishr.algorithms.__file__).parent
        write_text(package / STEP_COSTS, json.dumps(rounded, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
