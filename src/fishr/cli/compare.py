"""``fishr compare``."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.progress import TaskID

from fishr.cli import options
from fishr.cli.console import (
    DataRoot,
    Device,
    Json,
    ProgressBar,
    Quiet,
    print_json,
    print_line,
    print_notice,
    run_progress,
    stderr,
)
from fishr.cli.page import leave_report

if TYPE_CHECKING:
    from fishr.training import Observer, RunConfig, RunResult
    from fishr.workflows.compare import Plan
    from fishr.workflows.plan import Extent


def compare(
    data: str = typer.Argument(
        ..., metavar="DATA", help="A folder DOMAIN/CLASS/image, a manifest (CSV or Parquet), or a dataset's name."
    ),
    algorithms: list[str] = typer.Option(
        ["fishr"], "--algorithms", help="What to compare with ERM: names of fishr algorithms list."
    ),
    draws: int = typer.Option(3, "--draws", help="Hyperparameter settings of each algorithm that are tried."),
    seeds: int = typer.Option(3, "--seeds", help="Seeds of the setting chosen."),
    steps: int = typer.Option(1000, "--steps", help="Updates of each run."),
    budget: str | None = typer.Option(
        None, "--budget", help="Time for all of it, e.g. 2h: fewer draws, then seeds (not below 2), then steps (100)."
    ),
    select_by: str = typer.Option(
        "training",
        "--select-by",
        help="Hyperparameters are chosen on out-splits of the training domains (training), or on training domains "
        "that are left out in turn (leave-one-out).",
    ),
    output: Path | None = typer.Option(None, "--output", help="Folder of runs and results; default runs/compare-DATA."),
    batch_size: int | None = options.BatchSize,
    settings: list[str] = options.Set,
    average: str | None = options.Average,
    select: bool = options.Select,
    class_balanced: bool = options.ClassBalanced,
    precision: str = options.Precision,
    subset: int | None = options.Subset,
    track: str | None = options.Track,
    data_root: Path | None = DataRoot,
    image_size: int | None = options.ImageSize,
    channels: int | None = options.Channels,
    augment: str | None = options.Augment,
    cache: str | None = options.Cache,
    strict: bool = options.Strict,
    backbone: str | None = options.Backbone,
    backbone_arg: list[str] = options.BackboneArg,
    weights: Path | None = options.Weights,
    no_pretrained: bool = options.NoPretrained,
    mean: list[float] | None = options.Mean,
    std: list[float] | None = options.Std,
    train_batch_norm: bool = options.TrainBatchNorm,
    device: str = Device,
    as_json: bool = Json,
    quiet: bool = Quiet,
) -> None:
    """Which algorithm to use on your data, and what to expect of it on a domain it has not seen.

    Each domain is held out in turn; hyperparameters are chosen on the training domains alone. At the end the algorithm
    chosen is trained on all domains. Stopped and called again, it continues.

    Writes results.json, results.md and model/.

    Examples:

        fishr compare my/images --budget 2h --backbone resnet18 --image-size 128

        fishr compare colored-digits --algorithms fishr vrex irm --draws 1 --seeds 5
    """
    from typing import cast

    from fishr.reports.comparison import comparison_table
    from fishr.training import AverageConfig
    from fishr.training.config import Precision
    from fishr.workflows import compare as workflow
    from fishr.workflows.plan import Extent, parse_duration

    seconds = None if budget is None else parse_duration(budget)
    dataset = options.load_data(
        data,
        data_root,
        subset=subset,
        image_size=image_size,
        channels=channels,
        augment=augment,
        cache=cache,
        strict=strict,
    )
    setting = workflow.Setting(
        algorithms,
        Extent(draws, seeds, steps),
        seconds,
        cast(workflow.SelectBy, select_by),
        options.backbone_model(
            dataset, backbone, backbone_arg, weights, no_pretrained, mean, std, train_batch_norm=train_batch_norm
        ),
        options.hyperparameters(settings, batch_size),
        cast(Precision, precision),
        None if average is None else AverageConfig(average),
        select,
        class_balanced,
    )
    folder = Path("runs") / f"compare-{dataset.name}" if output is None else output
    with Watcher(quiet=quiet) as watcher:
        outcome = workflow.compare(dataset, setting, folder, watcher, weights=weights, device=device, track=track)
    for name, hints in outcome.hints.items():
        if hints:
            print_notice(f"hint, one of {len(hints)} from runs of {workflow.title(name)}: {hints[0]}")
    if as_json:
        print_json(json.loads((folder / "results.json").read_text(encoding="utf-8")))
    else:
        print_line(comparison_table(outcome.accuracies, workflow.titles(outcome.accuracies)))
        print_line(outcome.verdict.sentence)
        print_line(workflow.expectation_of(outcome))
        print_line(workflow.CAPTION)
        if watcher.trained == 0:
            print_line(f"All runs were done before; to make them anew, delete {folder}.")
        chosen = workflow.title(outcome.verdict.chosen)
        print_line(f"The model of {chosen}, trained on all domains, is in {outcome.model}, the results in {folder}.")
    leave_report(folder, made=watcher.trained > 0, quiet=as_json)


class Watcher:
    """Prints the plan and a line for each run; on a terminal it draws the progress too."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.drawn = stderr.is_terminal and not quiet
        self.done = self.trained = 0
        self.progress = run_progress(stderr)
        self.decoding = ProgressBar(self.progress, "")
        self.all_runs: TaskID | None = None

    def __enter__(self) -> "Watcher":
        if self.drawn:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.drawn:
            self.progress.stop()

    def on_images(self, done: int, total: int) -> None:
        self.decoding.on_images(done, total)

    def on_measure(self, algorithm: str) -> None:
        from fishr.workflows.compare import title

        self._say(f"measuring how long a run of {title(algorithm)} takes")

    def on_plan(self, plan: "Plan", asked: "Extent") -> None:
        from fishr.workflows.compare import title
        from fishr.workflows.plan import duration

        costs = ", ".join(f"{title(name)} {cost.step:.2g} s" for name, cost in plan.costs.items())
        reduced = "" if plan.extent == asked else f" instead of {asked}, for the budget"
        self._say(
            f"{plan.runs} runs: {plan.extent}{reduced}; about {duration(plan.seconds)} for all of them, as measured "
            f"(a step of {costs})"
        )
        self.all_runs = self.progress.add_task("runs", total=plan.runs, losses="")

    @contextmanager
    def run(self, name: str) -> "Iterator[Observer]":
        bar = ProgressBar(self.progress, name)
        yield bar
        bar.remove()

    def on_result(self, name: str, config: "RunConfig", result: "RunResult") -> None:
        self.done += 1
        self.trained += result.trained
        if self.all_runs is not None:
            self.progress.update(self.all_runs, completed=self.done)
        held_out = (
            f"{domain} {result.kept.domains[domain]['in'].accuracy * 100:.1f}" for domain in config.test_domains
        )
        accuracies = ", ".join(held_out) or "trained on all domains"
        self._say(f"{self.done:>4}  {name}: {accuracies}{'' if result.trained else ' (done before)'}")

    def _say(self, line: str) -> None:
        if not self.quiet:
            stderr.print(" ".join(line.split()), markup=False, soft_wrap=True)
