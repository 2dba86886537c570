"""The saved model: a folder with weights (safetensors) and a card (JSON, and Markdown to read).

Loading it executes nothing. ``SHA256SUMS`` lies beside card and weights and is compared with them: it tells of damage
and of edits, not of somebody who computes it anew. A card that was forged like that is still only data, and checked.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from fishr.data.base import network_input
from fishr.data.image_format import ImageFormat
from fishr.errors import ConfigError, DataError
from fishr.files import CHECKSUMS, checksums
from fishr.models.build import ModelConfig, build_model
from fishr.models.card import ModelCard, card_as_markdown

FORMAT = 2
WEIGHTS, CARD, README = "model.safetensors", "model.json", "README.md"


class SavedModel(nn.Module):
    """A trained featurizer and head with their card."""

    def __init__(self, featurizer: nn.Module, classifier: nn.Linear, card: ModelCard) -> None:
        super().__init__()
        self.featurizer, self.classifier, self.card = featurizer, classifier, card

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``[sample, class]`` of float32 inputs, or of uint8 images ``[sample, channel, row, column]``."""
        inputs = network_input(inputs, self.classifier.weight.device)
        logits: Tensor = self.classifier(self.featurizer(inputs))
        return logits

    def predict_proba(self, inputs: Tensor) -> Tensor:
        """Probability of each class, ``[sample, class]``; two columns for a single logit too."""
        logits = self(inputs)
        if self.card.binary:
            positive = torch.sigmoid(logits)
            return torch.cat([1 - positive, positive], dim=1)
        return torch.softmax(logits, dim=1)


def save_model(folder: Path, model: SavedModel) -> None:
    """Write weights and card, with their checksums, into an existing folder."""
    weights = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    card = {"format": FORMAT, **asdict(model.card)}
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    (folder / README).write_text(card_as_markdown(model.card), encoding="utf-8")
    (folder / CHECKSUMS).write_text(checksums(folder, CARD, WEIGHTS), encoding="utf-8")


def load_model(folder: Path | str) -> SavedModel:
    """Read a model folder, or the model of a run's folder; in ``eval()`` mode.

    Raises:
        DataError: the folder is no model, of another format version, was changed since it was written, or its files do
            not fit together.
    """
    folder = Path(folder)
    if not (folder / CARD).exists() and (folder / "model" / CARD).exists():
        folder = folder / "model"
    try:
        stored = (folder / CARD).read_bytes()
        _check_format(folder / CARD, stored)
        _check_sums(folder)
        card = _card_from(json.loads(stored.decode()))
        weights = load((folder / WEIGHTS).read_bytes())
    except FileNotFoundError:
        missing = next((name for name in (CARD, WEIGHTS, CHECKSUMS) if not (folder / name).exists()), CARD)
        raise DataError(f"{folder} is not a saved model: {missing} is missing") from None
    except OSError as error:
        raise DataError(f"{folder} is not a saved model: {error.strerror or error}") from None
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
        SafetensorError,
    ) as error:
        raise DataError(f"{folder} is not a usable saved model: {type(error).__name__}: {_one_line(error)}") from None
    try:
        model = SavedModel(*build_model(card.model, card.input_shape, card.num_outputs), card)
    except Exception as error:  # a network fails in many ways on options that it was not made for
        reason = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        raise DataError(f"the architecture in {folder / CARD} cannot be built: {reason}{_one_line(error)}") from None
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(f"the weights in {folder} do not fit the architecture in {CARD}: {_one_line(error)}") from None
    return model.eval()


def _check_format(file: Path, stored: bytes) -> None:
    """Raises DataError for a card of another format version, whatever else it says."""
    try:
        content = json.loads(stored.decode())
    except (ValueError, RecursionError):  # damaged, or no card: the checksums tell
        return
    if isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
        raise DataError(f"{file} is of another format version; this version reads format {FORMAT}")


def _check_sums(folder: Path) -> None:
    expected = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    for name in (CARD, WEIGHTS):
        if checksums(folder, name).rstrip("\n") not in expected:
            raise DataError(f"{folder}: {name} is not the file that was saved: it was changed or damaged")


def _card_from(content: Any) -> ModelCard:
    """The card in a file that anybody may have written.

    Raises:
        ValueError: something is not what :func:`save_model` writes there; also other errors, of Python's.
    """
    _require(isinstance(content, dict) and "format" in content, "the card", "with a format", content)
    # Text that is no Unicode could not be shown.
    json.dumps(content, ensure_ascii=False).encode("utf-8")
    model, shape, classes, binary = (content[name] for name in ("model", "input_shape", "classes", "binary"))
    _require(isinstance(model, dict), "model", "a mapping", model)
    config = ModelConfig(**model)
    _require(isinstance(config.featurizer, str), "featurizer", "text", config.featurizer)
    _require(isinstance(config.options, dict), "options", "a mapping", config.options)
    _require(isinstance(config.init, str), "init", "text", config.init)
    _require(config.weights is None or isinstance(config.weights, str), "weights", "text or null", config.weights)
    _require(
        isinstance(shape, list) and shape != [] and all(_is_int(length) and length > 0 for length in shape),
        "input_shape",
        "positive whole numbers",
        shape,
    )
    _require(isinstance(binary, bool), "binary", "true or false", binary)
    _require(
        _is_texts(classes)
        and len(set(classes)) == len(classes)
        and (len(classes) == 2 if binary else len(classes) > 1),
        "classes",
        "two different names" if binary else "two or more different names",
        classes,
    )
    card = ModelCard(
        config,
        tuple(shape),
        tuple(classes),
        binary,
        content["provenance"],
        _image_format(content["image_format"], shape),
    )
    _check_provenance(content["provenance"])
    # It reads what is left of the card, and fails where that is not what it is in a card of a run.
    card_as_markdown(card)
    return card


def _image_format(stored: Any, input_shape: list[int]) -> ImageFormat | None:
    if stored is None:
        return None
    _require(
        isinstance(stored, dict) and stored.keys() == {"size", "channels"} and all(map(_is_int, stored.values())),
        "image_format",
        "null, or size and channels as whole numbers",
        stored,
    )
    image_format = ImageFormat(**stored)
    expected = [image_format.channels, image_format.size, image_format.size]
    _require(input_shape == expected, "input_shape", f"{expected}, as image_format says", input_shape)
    return image_format


def _check_provenance(provenance: Any) -> None:
    _require(isinstance(provenance, dict), "provenance", "a mapping", provenance)
    config = provenance.get("config", {})
    _require(isinstance(config, dict), "config", "a mapping", config)
    _require(isinstance(config.get("data", ""), str), "data", "text", config.get("data"))
    if "train_domains" in provenance:
        domains, accuracy = provenance["train_domains"], provenance["accuracy"]
        _require(_is_texts(domains), "train_domains", "a list of names", domains)
        _require(isinstance(accuracy, dict), "accuracy", "a mapping", accuracy)
        _require(config.keys() >= {"data", "data_options", "test_domains"}, "config", "that of a run", config)
        _require(_is_texts(config["test_domains"]), "test_domains", "a list of names", config["test_domains"])
        _require(isinstance(config["data_options"], dict), "data_options", "a mapping", config["data_options"])


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        text = repr(got)
        raise ValueError(f"{name} must be {expected}, got {text if len(text) <= 200 else text[:200] + '…'}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_texts(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
