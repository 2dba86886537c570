"""Training: a run from its config to its model."""

from fishr.training.averaging import AverageConfig
from fishr.training.config import RunConfig
from fishr.training.loop import RunCost, RunResult, measure_cost, train
from fishr.training.observer import Observer

__all__ = ["AverageConfig", "Observer", "RunConfig", "RunCost", "RunResult", "measure_cost", "train"]
