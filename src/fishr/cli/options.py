"""Options that several commands share: of the data, the network and the training."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fishr.errors import ConfigError

if TYPE_CHECKING:
    from fishr.data import MultiDomainDataset
    from fishr.models import ModelConfig

IMAGES, BACKBONE = "Images", "Backbone"


def _known_tracker(name: str | None) -> str | None:
    """Found out before anything takes long."""
    if name is not None:
        from fishr.training.trackers import check_tracker

        check_tracker(name)
    return name


Precision = typer.Option("32", "--precision", help="32, or bf16-mixed: featurizer in bfloat16.")
Set = typer.Option([], "--set", metavar="KEY=VALUE", help="Hyperparameters, e.g. lr=1e-4.")
BatchSize = typer.Option(None, "--batch-size", help="Samples of each domain in a batch.")
ClassBalanced = typer.Option(False, "--class-balanced", help="Draw each class as often.")
Subset = typer.Option(None, "--subset", help="Samples of each domain to use, for short runs.")
Average = typer.Option(None, "--average", help="Average the weights over steps: sma, ema or swad.")
Track = typer.Option(
    None, "--track", help="Tell tensorboard, mlflow or wandb of every run trained.", callback=_known_tracker
)
Select = typer.Option(False, "--select", help="Keep the best checkpoint by training-domain validation, not the last.")

ImageSize = typer.Option(
    None,
    "--image-size",
    help="Images are brought to squares of as many pixels; default 224.",
    rich_help_panel=IMAGES,
)
Channels = typer.Option(None, "--channels", help="1 (gray), 3 (RGB, the default) or 4 (RGBA).", rich_help_panel=IMAGES)
Augment = typer.Option(
    None,
    "--augment",
    help="none, light (crop, flip) or domainbed (crop, flip, color jitter, grayscale; the default).",
    rich_help_panel=IMAGES,
)
Cache = typer.Option(
    None, "--cache", help="Where decoded images are kept: disk (the default), ram or none.", rich_help_panel=IMAGES
)
Strict = typer.Option(False, "--strict", help="Refuse data with a class missing from a domain.", rich_help_panel=IMAGES)
Backbone = typer.Option(
    None, "--backbone", help="Any model of timm; default for images resnet50.tv_in1k.", rich_help_panel=BACKBONE
)
BackboneArg = typer.Option(
    [], "--backbone-arg", metavar="KEY=VALUE", help="Its arguments, e.g. pad_type=same.", rich_help_panel=BACKBONE
)
Weights = typer.Option(
    None, "--weights", help="File with its initial weights: .safetensors or .pth.", rich_help_panel=BACKBONE
)
NoPretrained = typer.Option(False, "--no-pretrained", help="Start from random weights.", rich_help_panel=BACKBONE)
Mean = typer.Option(
    None, "--mean", help="Mean that --weights expect inputs to have, in [0, 1].", rich_help_panel=BACKBONE
)
Std = typer.Option(None, "--std", help="Standard deviation likewise.", rich_help_panel=BACKBONE)
TrainBatchNorm = typer.Option(
    False, "--train-batch-norm", help="Update the statistics of batch norm in training.", rich_help_panel=BACKBONE
)


def hyperparameters(settings: Sequence[str], batch_size: int | None) -> dict[str, Any]:
    """What ``--set`` and ``--batch-size`` ask for."""
    return parse_settings(settings) | ({} if batch_size is None else {"batch_size": batch_size})


def load_data(
    data: str,
    root: Path | None,
    *,
    subset: int | None,
    image_size: int | None,
    channels: int | None,
    augment: str | None,
    cache: str | None,
    strict: bool,
) -> "MultiDomainDataset":
    """The dataset that the options ask for."""
    from fishr.data import load_dataset

    images = image_options(image_size=image_size, channels=channels, augmentation=augment, cache=cache)
    return load_dataset(data, root=root, subset=subset, **images, **({"strict": True} if strict else {}))


def image_options(**given: Any) -> dict[str, Any]:
    """Options of images, those only that are given: datasets without images take none."""
    return {name: value for name, value in given.items() if value is not None}


def backbone_model(
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
