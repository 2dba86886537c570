"""The saved model: a folder with weights (safetensors) and a card (JSON). Loading it executes nothing."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fishr.errors import DataError
from fishr.models.build import ModelConfig, build_model

FORMAT = 1
WEIGHTS, CARD = "model.safetensors", "model.json"


@dataclass(frozen=True)
class ModelCard:
    """What a model takes and returns, and where it comes from.

    Attributes:
        model: Its architecture.
        input_shape: Shape of one input.
        classes: Name of each class.
        binary: Whether two classes are told apart by a single logit.
        provenance: Config of the run, versions, accuracies.
    """

    model: ModelConfig
    input_shape: tuple[int, ...]
    classes: tuple[str, ...]
    binary: bool
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_outputs(self) -> int:
        """Logits of the head."""
        return 1 if self.binary else len(self.classes)


class SavedModel(nn.Module):
    """A trained featurizer and head with their card."""

    def __init__(self, featurizer: nn.Module, classifier: nn.Linear, card: ModelCard) -> None:
        super().__init__()
        self.featurizer, self.classifier, self.card = featurizer, classifier, card

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``[sample, class]``."""
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
    card = {"format": FORMAT, **asdict(model.card)}
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def load_model(folder: Path | str) -> SavedModel:
    """Read a model folder; in ``eval()`` mode.

    Raises:
        DataError: the folder is no model, of another format version, or its files do not fit together.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / CARD).read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise DataError(f"{folder / CARD} is of another format version; this version reads format {FORMAT}")
        card = ModelCard(
            model=ModelConfig(**content["model"]),
            input_shape=tuple(content["input_shape"]),
            classes=tuple(content["classes"]),
            binary=content["binary"],
            provenance=content["provenance"],
        )
        weights = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        # The error of safetensors does not say which file.
        missing = next((name for name in (CARD, WEIGHTS) if not (folder / name).exists()), CARD)
        raise DataError(f"{folder} is not a saved model: {missing} is missing") from None
    except OSError as error:
        raise DataError(f"{folder} is not a saved model: {error.strerror or error}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DataError(f"{folder} is not a usable saved model: {type(error).__name__}: {error}") from None
    model = SavedModel(*build_model(card.model, card.input_shape, card.num_outputs), card)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(f"the weights in {folder} do not fit the architecture in {CARD}: {error}") from None
    return model.eval()
