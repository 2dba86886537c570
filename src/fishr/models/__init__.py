"""Networks: a featurizer and a linear head, built from a config, saved and loaded safely."""

from fishr.models.backbone import Backbone, backbone_config
from fishr.models.batch_context import BatchDependent, ContextFeaturizer, MeanEmbedding
from fishr.models.build import DEFAULT_BACKBONE, FEATURIZERS, ModelConfig, build_model, default_model
from fishr.models.card import ModelCard
from fishr.models.saved import SavedModel, load_model, save_model

__all__ = [
    "DEFAULT_BACKBONE",
    "FEATURIZERS",
    "Backbone",
    "BatchDependent",
    "ContextFeaturizer",
    "MeanEmbedding",
    "ModelCard",
    "ModelConfig",
    "SavedModel",
    "backbone_config",
    "build_model",
    "default_model",
    "load_model",
    "save_model",
]
