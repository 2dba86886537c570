"""``fishr export``."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fishr.cli.console import DataRoot, Json, Quiet, print_json, print_line, stderr
from fishr.errors import ConfigError
from fishr.registry import unknown

if TYPE_CHECKING:
    from torch import Tensor

    from fishr.models import ModelCard

FORMATS = ("onnx",)


def export(
    model: Path = typer.Argument(..., metavar="MODEL", help="Folder of a model, or of a finished run."),
    format: str = typer.Option("onnx", "--format", help="onnx."),
    images: list[Path] = typer.Option(
        [], "--images", help="Image files or folders to compare on, up to 64 images; default: those of its benchmark."
    ),
    output: Path | None = typer.Option(
        None, "--output", help="File to write; default model.onnx in the model's folder."
    ),
    data_root: Path | None = DataRoot,
    as_json: bool = Json,
    quiet: bool = Quiet,
) -> None:
    """Write a model as ONNX, for batches of any size, with its preprocessing described in a file beside it.

    The export is compared with the original in onnxruntime on real images. If a probability differs by more than 0.0001
    nothing is written. Needs onnx, onnxscript and onnxruntime: pip install 'fishr[onnx]'.

    Examples:

        fishr export runs/first --images my/images/hospital-3

        fishr export runs/first --format onnx --images one.jpg two.jpg --output deploy/first.onnx

        fishr export runs/pacs --data-root data
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    from fishr.deploy.export import export_onnx
    from fishr.models import load_model
    from fishr.models.saved import CARD

    saved = load_model(model)
    folder = model if (model / CARD).exists() else model / "model"
    file = folder / "model.onnx" if output is None else output
    examples = _examples(saved.card, images, data_root)
    with nullcontext() if quiet or not stderr.is_terminal else stderr.status("exporting and comparing"):
        report = export_onnx(saved, file, examples)
    size = report.file.stat().st_size
    if as_json:
        print_json(
            {
                "file": str(report.file),
                "preprocessing": str(report.preprocessing),
                "bytes": size,
                "samples": report.samples,
                "max_difference": report.max_difference,
                "labels_equal": report.labels_equal,
            }
        )
        return
    labels = "all labels equal" if report.labels_equal else "labels equal but for ties"
    what = "samples" if saved.card.image_format is None else "images"
    print_line(
        f"Compared with the original in onnxruntime on {report.samples} {what}: max difference of a probability "
        f"{report.max_difference:.1e}, {labels}."
    )
    print_line(f"Written: {report.file} ({size / 1e6:.1f} MB), {report.preprocessing}")


def _examples(card: "ModelCard", images: list[Path], data_root: Path | None) -> "Tensor":
    """What to compare on: the images named, else samples of the dataset that the model was trained on."""
    from fishr.data import is_dataset_name
    from fishr.deploy.evaluate import load_data_for
    from fishr.deploy.export import example_images, example_inputs

    if images and card.image_format is not None:
        return example_images(images, card.image_format)
    if images:
        raise ConfigError("the model takes no image files: leave --images out, and its own data are used")
    data = card.provenance.get("config", {}).get("data")
    if data is None or not is_dataset_name(data):
        if card.image_format is not None:
            raise ConfigError("name real images to compare the export on: --images FILES or --images FOLDER")
        raise ConfigError(
            "the model's card names no dataset of this package to compare the export on: call "
            "fishr.deploy.export.export_onnx with inputs of the model"
        )
    return example_inputs(load_data_for(card, data, root=data_root))
