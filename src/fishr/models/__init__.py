"""Networks: a featurizer and a linear head, built from a config, saved and loaded safely."""

from fishr.models.build import FEATURIZERS, ModelConfig, build_model, default_model
from fishr.models.saved import ModelCard, SavedModel, load_model, save_model

__all__ = [
    "FEATURIZERS",
    "ModelCard",
    "ModelConfig",
    "SavedModel",
    "build_model",
    "default_model",
    "load_model",
    "save_model",
]
