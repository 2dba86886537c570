"""Training: a run from its config to its model."""

from fishr.training.averaging import AverageConfig
from fishr.training.config import RunConfig
from fishr.training.evaluation import evaluate
from fishr.training.loop import Observer, RunResult, train

__all__ = ["AverageConfig", "Observer", "RunConfig", "RunResult", "evaluate", "train"]
