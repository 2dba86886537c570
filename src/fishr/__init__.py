"""Domain generalization by matching gradient variances across domains (Fishr), in closed form.

Nothing heavy is imported until it is used.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fishr import functional
    from fishr.data import DomainBatch, MultiDomainDataset, load_dataset
    from fishr.errors import FishrError
    from fishr.estimator import FishrClassifier, FishrRegressor
    from fishr.models import load_model
    from fishr.nn import FishrPenalty
    from fishr.training import RunConfig, train

__version__ = version("fishr")

_HOMES = {
    "DomainBatch": "fishr.data",
    "FishrClassifier": "fishr.estimator",
    "FishrError": "fishr.errors",
    "FishrPenalty": "fishr.nn",
    "FishrRegressor": "fishr.estimator",
    "MultiDomainDataset": "fishr.data",
    "RunConfig": "fishr.training",
    "load_dataset": "fishr.data",
    "load_model": "fishr.models",
    "train": "fishr.training",
}

_ROOMS = ("algorithms", "data", "deploy", "functional", "models", "nn", "testing", "training")

__all__ = [
    "DomainBatch",
    "FishrClassifier",
    "FishrError",
    "FishrPenalty",
    "FishrRegressor",
    "MultiDomainDataset",
    "RunConfig",
    "functional",
    "load_dataset",
    "load_model",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"fishr.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fishr' has no attribute {name!r}")
