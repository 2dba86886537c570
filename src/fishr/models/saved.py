"""The saved model: a folder with weights (safetensors) and a card (JSON, and Markdown to read).

Loading it executes nothing.
"""

import hashlib
import json
from collections.abc import Mapping
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
from fishr.models.build import ModelConfig, build_model
from fishr.models.card import ModelCard, card_as_markdown

FORMAT = 1
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
    """Write weights and card into an existing folder."""
    weights = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    with (folder / WEIGHTS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    card = {"format": FORMAT, "weights_sha256": digest, **asdict(model.card)}
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    (folder / README).write_text(card_as_markdown(model.card), encoding="utf-8")


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
        content = json.loads((folder / CARD).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise DataError(f"{folder / CARD} is of another format version; this version reads format {FORMAT}")
        card = _card_from(content)
        stored = (folder / WEIGHTS).read_bytes()
        if hashlib.sha256(stored).hexdigest() != content["weights_sha256"]:
            raise DataError(
                f"{folder / WEIGHTS} is not the file that {CARD} was written with: it was changed or damaged"
            )
        weights = load(stored)
    except FileNotFoundError:
        missing = next((name for name in (CARD, WEIGHTS) if not (folder / name).exists()), CARD)
        raise DataError(f"{folder} is not a saved model: {missing} is missing") from None
    except OSError as error:
        raise DataError(f"{folder} is not a saved model: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DataError(f"{folder} is not a usable saved model: {type(error).__name__}: {error}") from None
    try:
        model = SavedModel(*build_model(card.model, card.input_shape, card.num_outputs), card)
        model.load_state_dict(weights)
    except ConfigError as error:
        raise DataError(f"the architecture in {folder / CARD} cannot be built: {error}") from None
    except RuntimeError as error:
        raise DataError(f"the weights in {folder} do not fit the architecture in {CARD}: {error}") from None
    return model.eval()


def _card_from(content: Mapping[str, Any]) -> ModelCard:
    image_format = content["image_format"]
    return ModelCard(
        model=ModelConfig(**content["model"]),
        input_shape=tuple(content["input_shape"]),
        classes=tuple(content["classes"]),
        binary=content["binary"],
        provenance=content["provenance"],
        image_format=None if image_format is None else ImageFormat(**image_format),
    )
