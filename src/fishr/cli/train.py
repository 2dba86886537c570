"""``fishr train``."""

from pathlib import Path

import typer

from fishr.cli import options
from fishr.cli.config_file import ConfigFile
from fishr.cli.console import (
    DataRoot,
    Device,
    Json,
    Quiet,
    print_json,
    print_line,
    print_notice,
    print_table,
    progress_of_run,
    stderr,
)
from fishr.cli.page import leave_report
from fishr.errors import ConfigError, FishrError


def train(
    data: str = typer.Option(
        ...,
        "--data",
        help="A folder DOMAIN/CLASS/image, a manifest (CSV or Parquet), a dataset's name, or package.module:factory.",
    ),
    algorithm: str = typer.Option(
        "fishr", "--algorithm", help="Its name, see fishr algorithms list; or package.module:Class."
    ),
    test_domain: list[str] | None = typer.Option(
        None, "--test-domain", help="Domains held out; default: the dataset's customary one, if it has one."
    ),
    steps: int = typer.Option(5000, "--steps", help="Updates to make."),
    batch_size: int | None = options.BatchSize,
    settings: list[str] = options.Set,
    average: str | None = options.Average,
    average_arg: list[str] = typer.Option([], "--average-arg", metavar="KEY=VALUE", help="Its options, e.g. start=50."),
    select: bool = options.Select,
    class_balanced: bool = options.ClassBalanced,
    output: Path | None = typer.Option(
        None, "--output", help="Folder of the run; default runs/HASH, named by its config."
    ),
    seed: int = typer.Option(0, "--seed", help="Seed of initial weights and batches."),
    trial: int = typer.Option(0, "--trial", help="Seed of the 80/20 splits."),
    precision: str = options.Precision,
    subset: int | None = options.Subset,
    checkpoint_every: int | None = typer.Option(
        None, "--checkpoint-every", help="Updates between checkpoints; default a tenth of the run."
    ),
    snapshots: bool = typer.Option(
        False, "--snapshots", help="Keep the model of every checkpoint, for fishr analyze; disk: one model each."
    ),
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
    devices: int = typer.Option(1, "--devices", help="Devices to train on; on a CPU, processes."),
    nodes: int = typer.Option(1, "--nodes", help="Machines, each with as many; start the command on all of them."),
    compile: bool = typer.Option(
        False, "--compile", help="Compile the network: a minute or more at the start, then faster steps."
    ),
    as_json: bool = Json,
    quiet: bool = Quiet,
    config_file: Path | None = ConfigFile,
) -> None:
    """Train one model; called again with the same settings it continues, or says that it is done.

    The folder holds config.json, metrics.jsonl, checkpoints/ while it runs, snapshots/ if asked for, and model/ at the
    end.

    Examples:

        fishr train --data my/images --test-domain hospital-3 --steps 1000 --output runs/first

        fishr train --data pacs --test-domain sketch --backbone resnet18 --image-size 128 --average swad

        fishr train --data colored-digits --algorithm fishr --set penalty_weight=100 switch_on=0.4 --steps 500

        fishr train --data my/images --test-domain hospital-3 --device cuda --devices 4 --precision bf16-mixed
    """
    from fishr.deploy import keep_mistakes
    from fishr.training import AverageConfig, RunConfig
    from fishr.training import train as train_run
    from fishr.training.ranks import is_main_process

    def only_helps() -> bool:
        """Whether another process of the run speaks."""
        return devices * nodes > 1 and not is_main_process()

    stderr.quiet = only_helps()
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
    hparams = options.hyperparameters(settings, batch_size)
    if average_arg and average is None:
        raise ConfigError("--average-arg needs --average sma, ema or swad")
    average_options = options.parse_settings(average_arg, "--average-arg")
    config = RunConfig.for_dataset(
        dataset,
        algorithm,
        steps=steps,
        test_domains=tuple(test_domain) if test_domain else None,
        hparams=hparams,
        model=options.backbone_model(
            dataset, backbone, backbone_arg, weights, no_pretrained, mean, std, train_batch_norm=train_batch_norm
        ),
        checkpoint_every=checkpoint_every,
        seed=seed,
        trial=trial,
        precision=precision,
        average=None if average is None else AverageConfig(average, average_options),
        select=select,
        class_balanced=class_balanced,
    )
    folder = Path("runs") / config.hash if output is None else output
    try:
        with progress_of_run(f"{algorithm} on {dataset.name}", quiet=quiet) as observer:
            result = train_run(
                config,
                dataset,
                folder,
                weights=weights,
                device=device,
                devices=devices,
                nodes=nodes,
                compile=compile,
                snapshots=snapshots,
                observer=observer,
                track=track,
            )
    except FishrError:
        if only_helps():
            return
        raise
    if only_helps():
        return
    keep_mistakes(folder, dataset, device=device)
    for hint in result.hints:
        print_notice(f"hint: {hint}")
    kept = result.kept
    if as_json:
        print_json(
            {
                "folder": str(folder),
                "model": str(folder / "model"),
                "trained": result.trained,
                "step": kept.step,
                "held_out": list(config.test_domains),
                "accuracy": {
                    domain: {split: metrics.accuracy for split, metrics in splits.items()}
                    for domain, splits in kept.domains.items()
                },
                "hints": result.hints,
            }
        )
        leave_report(folder, made=result.trained, quiet=True)
        return
    rows = []
    for domain, splits in kept.domains.items():
        role = "held out" if domain in config.test_domains else "trained on"
        if domain in dataset.evaluation_only:
            role = "evaluation only"
        cells = (f"{splits[split].accuracy * 100:.1f}" if split in splits else "" for split in ("in", "out"))
        rows.append((domain, role, *cells))
    print_table(("domain", "role", "in-split", "out-split"), rows)
    said = "Trained" if result.trained else "Done before, nothing to do"
    print_line(
        f"{said}: accuracy in % of the model kept (step {kept.step} of {config.steps}); model in {folder / 'model'}."
    )
    leave_report(folder, made=result.trained)
