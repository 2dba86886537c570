"""Saved models as ONNX, compared with the original in onnxruntime before they are called done."""

import copy
import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fishr.data.base import MultiDomainDataset, network_input
from fishr.data.image_format import MODES, REDUCING_GAP, ImageFormat, read_image
from fishr.deploy.predict import find_images
from fishr.errors import ConfigError, DataError, FishrError, UnreadableImageError
from fishr.models.card import ModelCard
from fishr.models.saved import SavedModel

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

TOLERANCE = 1e-4
"""Difference of a probability that rounding explains.

In float32, batches of different sizes differ by up to about 1e-5 for confident models, also without any export.
"""

MOST_EXAMPLES = 64
"""Images that an export is compared on."""

NEEDED = ("onnx", "onnxscript", "onnxruntime")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportReport:
    """How an exported model compares with its original.

    Attributes:
        file: The ONNX file.
        preprocessing: The file beside it that says how images become its input.
        samples: Samples that were compared, each in batches of 1, of 2 and of all.
        max_difference: Largest difference of a probability.
        labels_equal: Whether the most probable class of every sample is the same. If not, its two most probable
            classes are a tie: their probabilities are apart by no more than twice the largest difference.
    """

    file: Path
    preprocessing: Path
    samples: int
    max_difference: float
    labels_equal: bool


def export_onnx(model: SavedModel, file: Path, images: Tensor) -> ExportReport:
    """Export a model as ONNX and compare it with the original in onnxruntime.

    The graph takes ``images``, float32 ``[batch, channel, row, column]`` with values in [0, 1] and a batch of any size
    (``inputs`` for a model that takes no images), and returns ``probabilities``, float32 ``[batch, class]``. The
    normalisation of colors is in the graph; how an image file becomes the input is written beside it, in
    ``NAME.preprocessing.json``. Weights of more than 1.5 GB go into a file of their own, ``NAME.onnx.data``.

    Nothing is there under these names before the comparison is made: of the probabilities of all samples, one at a
    time, two at a time and all at once, none may differ by more than :data:`TOLERANCE`.

    Args:
        model: The model; it stays as it is.
        file: The file to write.
        images: Inputs to compare on: float32, or uint8 images, ``[sample, channel, row, column]``; real ones, since the
            differences depend on them.

    Raises:
        ConfigError: onnx, onnxscript or onnxruntime is not installed, the model's prediction for a sample depends on
            the rest of its batch, the network cannot be expressed in ONNX, or the file is a folder.
        DataError: inputs that do not fit the model, or probabilities that are not finite.
        FishrError: the exported model differs from the original.
    """
    card = model.card
    if card.depends_on_batch:
        raise ConfigError(
            "the model cannot be exported: it adapts to the domain of a batch, so its prediction for a sample depends "
            "on the others there, and an exported model would answer differently with every batch size; use 'fishr "
            "predict', or train a model that predicts each sample by itself"
        )
    _check_installed()
    if file.is_dir():
        raise ConfigError(f"{file} is a folder: name the file to write, such as {file / 'model.onnx'}")
    if len(images) == 0 or tuple(images.shape[1:]) != card.input_shape:
        raise DataError(
            f"the model is compared on at least one input of shape {list(card.input_shape)}, "
            f"got {list(images.shape[1:])} ({len(images)} of them)"
        )
    model = copy.deepcopy(model).cpu().eval()
    inputs = network_input(images, torch.device("cpu"))
    expected = _check_independent_of_batch(model, inputs)
    name = "inputs" if card.image_format is None else "images"
    file.parent.mkdir(parents=True, exist_ok=True)
    preprocessing = file.with_suffix(".preprocessing.json")
    with TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
        aside = Path(folder)
        _write_onnx(model, inputs, name, aside / file.name)
        max_difference, labels_equal = _compare(aside / file.name, name, inputs.numpy(), expected)
        # Not "greater than": a difference that is no number must not pass either.
        if not max_difference <= TOLERANCE:
            raise FishrError(
                f"the exported model differs from the original: probabilities of {len(inputs)} samples by up to "
                f"{max_difference:.2g} in onnxruntime, expected at most {TOLERANCE:g}; nothing was written. Newer "
                "versions of torch, onnxscript and onnxruntime may do better"
            )
        (aside / preprocessing.name).write_text(
            json.dumps(preprocessing_of(card), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        for written in sorted(aside.iterdir(), key=lambda path: path.name == file.name):  # the model last
            written.replace(file.parent / written.name)
    return ExportReport(file, preprocessing, len(inputs), max_difference, labels_equal)


def preprocessing_of(card: ModelCard) -> dict[str, Any]:
    """How an image file becomes an input of the exported model, for people and programs without this package."""
    image_format = card.image_format
    content: dict[str, Any] = {
        "input": {
            "name": "inputs" if image_format is None else "images",
            "type": "float32",
            "shape": ["batch", *card.input_shape],
        },
        "output": {"name": "probabilities", "type": "float32", "shape": ["batch", len(card.classes)]},
        "classes": list(card.classes),
    }
    if image_format is None:
        return {**content, "steps": ["The model takes no image files, but float32 numbers as its data set has them."]}
    size, mode = image_format.size, MODES[image_format.channels]
    return {
        **content,
        "size": size,
        "mode": mode,
        "shorter_side": image_format.shorter_side,
        "reducing_gap": REDUCING_GAP,
        "steps": _steps(image_format),
    }


def _steps(image_format: ImageFormat) -> list[str]:
    size, shorter_side = image_format.size, image_format.shorter_side
    mode = MODES[image_format.channels]
    converted = {
        "L": "Convert it to gray (PIL's mode L): luma of the colors, alpha dropped and not blended.",
        "RGB": "Convert it to RGB: gray three times, alpha dropped and not blended.",
        "RGBA": "Convert it to RGBA: without alpha, it is 255 everywhere.",
    }[mode]
    steps = [
        "Read the image file with PIL; of several frames or pages, take the first. Large JPEG files may be decoded at "
        "a half, a quarter or an eighth of their size, as fishr does (PIL's draft), as long as the shorter side is at "
        f"least {round(REDUCING_GAP * shorter_side)} pixels; it changes little.",
        "If it is gray with 16 bits, divide by 257 and round, to have 8 bits.",
        converted,
        f"If its shorter side is above {shorter_side} pixels, shrink it to (round(s * width), round(s * height)) with "
        f"s = {shorter_side} / min(width, height), by PIL's resize with BICUBIC and reducing_gap={REDUCING_GAP}.",
        "Turn it upright, as its EXIF orientation says (PIL: ImageOps.exif_transpose).",
        f"Resize it to {size} x {size} pixels, whatever its aspect ratio, by PIL's resize with BILINEAR (which is "
        "antialiased: an interpolation of four pixels is not the same).",
        "Divide by 255, to have float32 numbers from 0 to 1.",
        f"Bring them into the order batch, channel ({', '.join(mode)}), row, column.",
        "Do not subtract a mean or divide by a standard deviation: if that is needed, the model does it.",
    ]
    if mode == "RGBA":
        steps.insert(6, "In both resizes, resize each channel on its own: PIL would weigh colors by alpha.")
    return steps


def example_images(paths: Sequence[Path], image_format: ImageFormat) -> Tensor:
    """Images to compare on, uint8 ``[sample, channel, row, column]``: at most 64, evenly spread over those there are.

    Images that cannot be read are left out with a warning.

    Args:
        paths: Image files and folders, which are searched for images; see :func:`fishr.deploy.predict.find_images`.
        image_format: What images are brought to.

    Raises:
        DataError: a path that does not exist, a folder without images, or no image that can be read.
    """
    found = list(find_images(paths))
    images = []
    for path in (found[index] for index in _spread(len(found), MOST_EXAMPLES)):
        try:
            images.append(image_format.fit(read_image(path, image_format)))
        except UnreadableImageError as error:
            logger.warning("left out %s: %s", path, error)
    if not images:
        raise DataError("none of the images to compare on can be read: name others with --images")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def example_inputs(dataset: MultiDomainDataset) -> Tensor:
    """Inputs of a dataset to compare on: at most 64, evenly spread over each domain."""
    each = max(1, MOST_EXAMPLES // len(dataset.domains))
    return torch.cat(
        [
            samples.inputs[torch.from_numpy(_spread(len(samples.targets), each))]
            for samples in list(dataset.domains.values())[:MOST_EXAMPLES]
        ]
    )


class _Probabilities(nn.Module):
    """What is exported."""

    def __init__(self, model: SavedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model.predict_proba(inputs)


@torch.no_grad()
def _check_independent_of_batch(model: SavedModel, inputs: Tensor) -> NDArray[np.float32]:
    """Probabilities ``[sample, class]``, once they are found to be those of each sample alone and in other company."""
    together = model.predict_proba(inputs)
    if not together.isfinite().all():
        raise DataError("the model's probabilities are not finite: its weights have values it cannot compute with")
    alone = torch.cat([model.predict_proba(inputs[index : index + 1]) for index in range(len(inputs))])
    # Inverted samples, so that there is other company for a single one too.
    mixed = torch.cat([model.predict_proba(torch.cat([half, 1 - half]))[: len(half)] for half in inputs.chunk(2)])
    change = max((together - alone).abs().max().item(), (together - mixed).abs().max().item())
    if change > TOLERANCE:
        raise ConfigError(
            f"the model cannot be exported: its prediction for a sample depends on the others in the batch "
            f"(probabilities change by up to {change:.2g}), and an exported model would answer differently with every "
            "batch size; use 'fishr predict', or train a model that predicts each sample by itself"
        )
    expected: NDArray[np.float32] = together.numpy()
    return expected


@torch.no_grad()
def _write_onnx(model: SavedModel, inputs: Tensor, name: str, file: Path) -> None:
    from torch.export import Dim

    # Two samples: torch takes a batch of one for a constant.
    example = inputs[[0, -1]]
    try:
        # What torch and onnxscript warn of is their own use of each other; the comparison shows whether it matters.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _Probabilities(model).eval(),
                (example,),
                dynamo=True,
                input_names=[name],
                output_names=["probabilities"],
                dynamic_shapes=({0: Dim("batch")},),
                verbose=False,
            )
    except Exception as error:
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        raise ConfigError(
            f"the network cannot be exported to ONNX with a batch of any size ({_one_line(reason)}): "
            "a newer version of torch or onnxscript may be able to, or choose another backbone"
        ) from error
    cast("ONNXProgram", program).save(file)


def _compare(file: Path, name: str, inputs: NDArray[np.float32], expected: NDArray[np.float32]) -> tuple[float, bool]:
    """Largest difference of a probability, and whether all labels are equal, over batches of 1, 2 and all samples."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what matters is raised
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    differences, labels_equal = [], True
    for size in sorted({1, 2, len(inputs)}):
        found = np.concatenate(
            [session.run(None, {name: inputs[start : start + size]})[0] for start in range(0, len(inputs), size)]
        )
        differences.append(np.abs(found - expected).max())
        labels_equal &= np.array_equal(found.argmax(1), expected.argmax(1))
    return float(np.max(differences)), labels_equal


def _check_installed() -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ConfigError(
            f"exporting needs {' and '.join(missing)}, which {verb} not installed: pip install 'fishr[onnx]'"
        )


def _spread(size: int, most: int) -> NDArray[np.int64]:
    """Indices of at most so many of ``size`` items, evenly spread."""
    kept = min(size, most)
    return np.arange(kept) * size // max(kept, 1)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}…"
