"""``fishr train``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fishr.cli.console import (
    DataRoot,
    Device,
    Json,
    Quiet,
    print_json,
    print_line,
    print_table,
    progress_of_run,
)
from fishr.errors import ConfigError

if TYPE_CHECKING:
    from fishr.data import MultiDomainDataset
    from fishr.models import ModelConfig

IMAGES, BACKBONE = "Images", "Backbone"


def train(
    data: str = typer.Option(
        ..., "--data", help="A folder DOMAIN/CLASS/image, a manifest (CSV or Parquet), or a dataset's name."
    ),
    algorithm: str = typer.Option("fishr", "--algorithm", help="erm, irm, vrex or fishr."),
    test_domain: list[str] | None = typer.Option(
        None, "--test-domain", help="Domains held out; default: the dataset's customary one, if it has one."
    ),
    steps: int = typer.Option(5000, "--steps", help="Updates to make."),
    batch_size: int | None = typer.Option(None, "--batch-size", help="Samples of each domain in a batch."),
    settings: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="Hyperparameters, e.g. lr=1e-4."),
    average: str | None = typer.Option(None, "--average", help="Average the weights over steps: sma, ema or swad."),
    average_arg: list[str] = typer.Option([], "--average-arg", metavar="KEY=VALUE", help="Its options, e.g. start=50."),
    select: bool = typer.Option(
        False, "--select", help="Keep the best checkpoint by training-domain validation, not the last."
    ),
    class_balanced: bool = typer.Option(False, "--class-balanced", help="Draw each class as often."),
    output: Path | None = typer.Option(
        None, "--output", help="Folder of the run; default runs/HASH, named by its config."
    ),
    seed: int = typer.Option(0, "--seed", help="Seed of initial weights and batches."),
    trial: int = typer.Option(0, "--trial", help="Seed of the 80/20 splits."),
    precision: str = typer.Option("32", "--precision", help="32, or bf16-mixed: featurizer in bfloat16."),
    subset: int | None = typer.Option(None, "--subset", help="Samples of each domain to use, for short runs."),
    checkpoint_every: int | None = typer.Option(
        None, "--checkpoint-every", help="Updates between checkpoints; default a tenth of the run."
    ),
    data_root: Path | None = DataRoot,
    image_size: int | None = typer.Option(
        None,
        "--image-size",
        help="Images are brought to squares of as many pixels; default 224.",
        rich_help_panel=IMAGES,
    ),
    channels: int | None = typer.Option(
        None, "--channels", help="1 (gray), 3 (RGB, the default) or 4 (RGBA).", rich_help_panel=IMAGES
    ),
    augment: str | None = typer.Option(
        None,
        "--augment",
        help="none, light (crop, flip) or domainbed (crop, flip, color jitter, grayscale; the default).",
        rich_help_panel=IMAGES,
    ),
    cache: str | None = typer.Option(
        None, "--cache", help="Where decoded images are kept: disk (the default), ram or none.", rich_help_panel=IMAGES
    ),
    strict: bool = typer.Option(
        False, "--strict", help="Refuse data with a class missing from a domain.", rich_help_panel=IMAGES
    ),
    backbone: str | None = typer.Option(
        None, "--backbone", help="Any model of timm; default for images resnet50.tv_in1k.", rich_help_panel=BACKBONE
    ),
    backbone_arg: list[str] = typer.Option(
        [], "--backbone-arg", metavar="KEY=VALUE", help="Its arguments, e.g. pad_type=same.", rich_help_panel=BACKBONE
    ),
    weights: Path | None = typer.Option(
        None, "--weights", help="File with its initial weights: .safetensors or .pth.", rich_help_panel=BACKBONE
    ),
    no_pretrained: bool = typer.Option(
        False, "--no-pretrained", help="Start from random weights.", rich_help_panel=BACKBONE
    ),
    mean: list[float] | None = typer.Option(
        None, "--mean", help="Mean that --weights expect inputs to have, in [0, 1].", rich_help_panel=BACKBONE
    ),
    std: list[float] | None = typer.Option(
        None, "--std", help="Standard deviation likewise.", rich_help_panel=BACKBONE
    ),
    train_batch_norm: bool = typer.Option(
        False, "--train-batch-norm", help="Update the statistics of batch norm in training.", rich_help_panel=BACKBONE
    ),
    device: str = Device,
    as_json: bool = Json,
    quiet: bool = Quiet,
) -> None:
    """Train one model; called again with the same settings it continues, or says that it is done.

    The folder holds config.json, metrics.jsonl, checkpoints/ while it runs, and model/ at the end.

    Examples:

        fishr train --data my/images --test-domain hospital-3 --steps 1000 --output runs/first

        fishr train --data pacs --test-domain sketch --backbone resnet18 --image-size 128 --average swad

        fishr train --data colored-digits --algorithm fishr --set penalty_weight=100 switch_on=0.4 --steps 500
    """
    from fishr.data import load_dataset
    from fishr.training import AverageConfig, RunConfig
    from fishr.training import train as train_run

    given: dict[str, Any] = {
        "image_size": image_size,
        "channels": channels,
        "augmentation": augment,
        "cache": cache,
        "strict": strict or None,
    }
    options = {name: value for name, value in given.items() if value is not None}
    dataset = load_dataset(data, root=data_root, subset=subset, **options)
    hparams = parse_settings(settings) | ({} if batch_size is None else {"batch_size": batch_size})
    if average_arg and average is None:
        raise ConfigError("--average-arg needs --average sma, ema or swad")
    config = RunConfig.for_dataset(
        dataset,
        algorithm,
        steps=steps,
        test_domains=tuple(test_domain) if test_domain else None,
        hparams=hparams,
        model=_backbone(
            dataset, backbone, backbone_arg, weights, no_pretrained, mean, std, train_batch_norm=train_batch_norm
        ),
        checkpoint_every=checkpoint_every,
        seed=seed,
        trial=trial,
        precision=precision,
        average=None if average is None else AverageConfig(average, parse_settings(average_arg, "--average-arg")),
        select=select,
        class_balanced=class_balanced,
    )
    folder = Path("runs") / config.hash if output is None else output
    with progress_of_run(f"{algorithm} on {dataset.name}", quiet=quiet) as observer:
        result = train_run(config, dataset, folder, weights=weights, device=device, observer=observer)
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
            }
        )
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


def _backbone(
    dataset: "MultiDomainDataset",
    name: str | None,
    arguments: Sequence[str],
    weights: Path | None,
    no_pretrained: bool,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    *,
    train_batch_norm: bool,
) -> "ModelConfig | None":
    """The backbone that the options ask for; None leaves the choice to the kind of data."""
    if not (name or arguments or weights or no_pretrained or mean or std or train_batch_norm):
        return None
    if len(dataset.input_shape) != 3:
        raise ConfigError(f"a backbone takes images; inputs of {dataset.name!r} have shape {list(dataset.input_shape)}")
    if weights is not None and no_pretrained:
        raise ConfigError("--weights and --no-pretrained exclude each other")
    from fishr.models import DEFAULT_BACKBONE
    from fishr.models.backbone import backbone_config

    return backbone_config(
        name or DEFAULT_BACKBONE,
        channels=dataset.input_shape[0],
        arguments=parse_settings(arguments, "--backbone-arg"),
        weights=None if no_pretrained else weights or "hub",
        mean=mean or None,
        std=std or None,
        frozen_batch_norm=False if train_batch_norm else None,
    )


def parse_settings(settings: Sequence[str], option: str = "--set") -> dict[str, Any]:
    """``key=value`` pairs; a value is read as JSON where it is JSON, else as text.

    >>> parse_settings(["lr=1e-4", "variant=covariance", "ema=null"])
    {'lr': 0.0001, 'variant': 'covariance', 'ema': None}
    """
    parsed: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise ConfigError(f"{option} takes KEY=VALUE, got {setting!r}")
        try:
            parsed[name] = json.loads(text)
        except json.JSONDecodeError:
            parsed[name] = text
    return parsed
