"""``fishr sweep run``."""

import signal
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer
from rich.progress import TaskID

from fishr.cli import options
from fishr.cli.config_file import ConfigFile
from fishr.cli.console import DataRoot, Device, Quiet, print_line, print_notice, run_progress, stderr
from fishr.cli.page import leave_report
from fishr.errors import ConfigError, RunInterruptedError
from fishr.records import DONE_FILE
from fishr.registry import unknown
from fishr.sweeps.folder import Job, SweepFolder, failure
from fishr.workflows.plan import count, duration

if TYPE_CHECKING:
    from fishr.data import MultiDomainDataset
    from fishr.sweeps.grid import Grid
    from fishr.sweeps.runs import Order, Outcome

EXECUTORS = ("local", "ray")
SOME_FAILED = 1
"""Exit code."""
SCALE = "Where it runs"


def run(
    datasets: list[str] = typer.Option(
        ..., "--datasets", help="Folders DOMAIN/CLASS/image, manifests, names of datasets, or package.module:factory."
    ),
    algorithms: list[str] = typer.Option(..., "--algorithms", help="Their names, see fishr algorithms list."),
    test_domain: list[str] | None = typer.Option(
        None, "--test-domain", help="Domains held out in turn; default: each of the dataset's."
    ),
    leave_one_out: bool = typer.Option(
        False, "--leave-one-out", help="Hold out pairs of domains too, for leave-one-domain-out selection."
    ),
    draws: int = typer.Option(20, "--draws", help="Hyperparameter draws; the first are the defaults."),
    trials: int = typer.Option(3, "--trials", help="Seeds of the 80/20 splits."),
    steps: int = typer.Option(5001, "--steps", help="Updates of each run."),
    checkpoint_every: int | None = typer.Option(
        None,
        "--checkpoint-every",
        help="Updates between checkpoints; default the dataset's published number, else 300.",
    ),
    output: Path = typer.Option(Path("runs/sweep"), "--output", help="Folder of the sweep."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Only say how many runs there are and what they take."),
    batch_size: int | None = options.BatchSize,
    settings: list[str] = options.Set,
    average: str | None = options.Average,
    class_balanced: bool = options.ClassBalanced,
    precision: str = options.Precision,
    subset: int | None = options.Subset,
    keep_models: bool = typer.Option(
        False, "--keep-models", help="Keep the model of each run made; tables need the records only."
    ),
    track: str | None = options.Track,
    config_file: Path | None = ConfigFile,
    executor: str = typer.Option("local", "--executor", help="local, or ray.", rich_help_panel=SCALE),
    num_slots: int | None = typer.Option(
        None,
        "--slots",
        help="Runs at a time (local); default one for each GPU, else for each CPU.",
        rich_help_panel=SCALE,
    ),
    address: str | None = typer.Option(None, "--address", help="Of the Ray cluster.", rich_help_panel=SCALE),
    cpus_per_run: int | None = typer.Option(
        None, "--cpus-per-run", help="CPUs of a run (ray); default 1.", rich_help_panel=SCALE
    ),
    gpus_per_run: float | None = typer.Option(
        None, "--gpus-per-run", help="GPUs of a run, or a part of one (ray); default none.", rich_help_panel=SCALE
    ),
    retries: int = typer.Option(
        2,
        "--retries",
        help="How often a run is continued whose process or node died before it came to another checkpoint.",
        rich_help_panel=SCALE,
    ),
    data_root: Path | None = DataRoot,
    image_size: int | None = options.ImageSize,
    channels: int | None = options.Channels,
    augment: str | None = options.Augment,
    cache: str | None = options.Cache,
    backbone: str | None = options.Backbone,
    backbone_arg: list[str] = options.BackboneArg,
    weights: Path | None = options.Weights,
    no_pretrained: bool = options.NoPretrained,
    mean: list[float] | None = options.Mean,
    std: list[float] | None = options.Std,
    train_batch_norm: bool = options.TrainBatchNorm,
    device: str = Device,
    quiet: bool = Quiet,
) -> None:
    """Datasets × algorithms × held-out domains × draws × trials, each run once.

    Called again it makes what is missing; with more draws, trials, algorithms or datasets it adds their runs. Several
    machines on one file system may work on the same folder. Tables: fishr report FOLDER.

    Examples:

        fishr sweep run --datasets colored-mnist rotated-mnist --algorithms erm fishr --draws 2 --trials 2 --steps 300

        fishr sweep run --config sweep.yaml --executor ray --address auto --gpus-per-run 0.5
    """
    from fishr.sweeps import local, on_ray
    from fishr.sweeps.estimate import estimate
    from fishr.sweeps.grid import Grid, Source, configs
    from fishr.sweeps.runs import Order
    from fishr.training import AverageConfig
    from fishr.training.config import Precision
    from fishr.training.signals import stop_on_signal

    if executor not in EXECUTORS:
        raise unknown("executor", executor, EXECUTORS)
    of_executors: dict[str, Mapping[str, object]] = {
        "local": {"--slots": num_slots},
        "ray": {"--address": address, "--cpus-per-run": cpus_per_run, "--gpus-per-run": gpus_per_run},
    }
    for of_executor, values in of_executors.items():
        for name, value in values.items():
            if of_executor != executor and value is not None:
                raise ConfigError(f"{name} is of --executor {of_executor}, not {executor}")
    share = on_ray.Share(1 if cpus_per_run is None else cpus_per_run, gpus_per_run or 0.0)
    grid = Grid(
        algorithms=tuple(algorithms),
        test_domains=tuple(test_domain) if test_domain else None,
        draws=draws,
        trials=trials,
        leave_one_out=leave_one_out,
        steps=steps,
        checkpoint_every=checkpoint_every,
        hparams=options.hyperparameters(settings, batch_size),
        precision=cast(Precision, precision),
        average=None if average is None else AverageConfig(average),
        class_balanced=class_balanced,
    )
    images = options.image_options(image_size=image_size, channels=channels, augmentation=augment, cache=cache)
    weights = None if weights is None else weights.resolve()
    sweep = SweepFolder(output.resolve())
    shared = {
        "steps": steps,
        "checkpoint_every": checkpoint_every,
        "set": settings,
        "batch_size": batch_size,
        "average": average,
        "class_balanced": class_balanced,
        "precision": precision,
        "subset": subset,
        "image_size": image_size,
        "channels": channels,
        "augment": augment,
        "backbone": backbone,
        "backbone_arg": backbone_arg,
        "weights": None if weights is None else str(weights),
        "no_pretrained": no_pretrained,
        "mean": mean,
        "std": std,
        "train_batch_norm": train_batch_norm,
    }
    asked_before = sweep.asked_to_stop()
    sweep.check(shared)
    loaded: dict[str, MultiDomainDataset] = {}
    orders: list[Order] = []
    for name in dict.fromkeys(datasets):
        source = Source.of(name, data_root, {"subset": subset, **images})
        dataset = source.load()
        if dataset.name in loaded:
            raise ConfigError(f"two datasets are called {dataset.name!r}: rename one")
        loaded[dataset.name] = dataset
        model = options.backbone_model(
            dataset, backbone, backbone_arg, weights, no_pretrained, mean, std, train_batch_norm=train_batch_norm
        )
        orders += [
            Order(config, source, sweep.runs / config.hash, weights, device, keep_models, track)
            for config in configs(grid, dataset, model)
        ]
    done = sum((order.folder / DONE_FILE).exists() for order in orders)
    missing = [order for order in orders if not (order.folder / DONE_FILE).exists() and failure(order.folder) is None]
    slots = local.slots(num_slots, device) if executor == "local" else []
    say = print_notice if not quiet or dry_run else _say_nothing
    say(f"{count(len(orders), 'run')}: {_made_of(grid, loaded)}; {done:,} of them done")
    if missing:
        say("measuring how long a run takes")
        if executor == "local":
            threads = len(slots[0].cpus)
            takes = estimate(missing, loaded, len(slots), threads, device)
            how = f"{count(len(slots), 'run')} at a time, {count(threads, 'thread')} each"
        else:
            takes = estimate(missing, loaded, 1, share.cpus, "auto")
            how = f"one after the other with {count(share.cpus, 'thread')} on this machine; a cluster makes several"
        say(
            f"about {duration(takes.seconds)} for the others, {how}; "
            f"disk: {_size(takes.kept)}, and up to {_size(takes.working)} meanwhile"
        )
    if dry_run:
        return
    # A root that was not given is each machine's own.
    sweep.plan(shared, [_job(order, order.source.root if data_root else None) for order in orders])
    with stop_on_signal() as signalled, Watcher(len(orders), quiet=quiet) as watcher:

        def should_stop() -> bool:
            return signalled.signal_number is not None or sweep.asked_to_stop() != asked_before

        if executor == "local":
            finished = local.make_runs(
                orders, slots, watcher, logs=sweep.logs, retries=retries, should_stop=should_stop
            )
        else:
            finished = on_ray.make_runs(
                orders, watcher, address=address, share=share, retries=retries, should_stop=should_stop
            )
    if not finished:
        raise RunInterruptedError(
            f"stopped; the runs are saved in {output}: the same command continues",
            signalled.signal_number or signal.SIGTERM,
        )
    print_line(f"{count(watcher.counts['done'], 'run')} done; tables: fishr report {output}")
    if watcher.counts["done"]:
        leave_report(output, made=bool(watcher.started))
    if failed := watcher.counts["failed"]:
        print_notice(
            f"{count(failed, 'run')} failed: fishr sweep status {output} says why; after fishr sweep retry {output} "
            "the same command makes them again"
        )
        raise typer.Exit(SOME_FAILED)


class Watcher:
    """A line for each run made here or failed; on a terminal also how many are done and the time left."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        self.total, self.quiet = total, quiet
        self.counts: Counter[str] = Counter()
        self.started: set[Path] = set()
        self.progress = run_progress(stderr, disable=quiet or not stderr.is_terminal)
        self.task: TaskID = self.progress.add_task("runs", total=total, losses="")

    def __enter__(self) -> "Watcher":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def on_start(self, order: "Order") -> None:
        self.started.add(order.folder)

    def on_outcome(self, order: "Order", outcome: "Outcome") -> None:
        self.counts[outcome.state] += 1
        self.progress.advance(self.task)
        if outcome.state == "failed" or order.folder in self.started:
            said = f"{outcome.state}{outcome.reason and ': '}{outcome.reason}"
            self._say(f"{self.counts.total():>{len(str(self.total))}} of {self.total} {said}", order)

    def on_retry(self, order: "Order", reason: str) -> None:
        self._say(f"{reason}, it is continued", order)

    def _say(self, said: str, order: "Order") -> None:
        if not self.quiet:
            print_notice(f"{_job(order).title}: {said}")


def _job(order: "Order", root: str | None = None) -> Job:
    config = order.config
    assert config.draw is not None
    return Job(
        order.folder.name,
        config.data,
        config.algorithm,
        config.test_domains,
        config.draw,
        config.trial,
        order.source.name,
        root,
    )


def _made_of(grid: "Grid", datasets: Mapping[str, "MultiDomainDataset"]) -> str:
    parts = (
        count(len(datasets), "dataset"),
        count(len(set(grid.algorithms)), "algorithm"),
        "held-out domains and pairs of them" if grid.leave_one_out else "held-out domains",
        count(grid.draws, "draw"),
        count(grid.trials, "trial"),
    )
    return " x ".join(parts)


def _size(number: int) -> str:
    """Bytes for a reader.

    >>> _size(1_234_567), _size(900)
    ('1.2 MB', '900 bytes')
    """
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number} bytes"


def _say_nothing(message: str) -> None: ...
