"""Who watches a run while it is made."""

from collections.abc import Mapping
from typing import Protocol

from fishr.records import RunRecord
from fishr.training.config import RunConfig


class Observer(Protocol):
    """Somebody who watches a run, such as a progress bar."""

    def on_images(self, done: int, total: int) -> None:
        """So many of the images are decoded; not called when all are in the cache."""

    def on_start(self, config: RunConfig, step: int) -> None:
        """The run begins, or continues after ``step`` updates."""

    def on_step(self, step: int, losses: Mapping[str, float]) -> None:
        """``step`` updates have been made; the loss terms are those of the last one looked at."""

    def on_record(self, record: RunRecord) -> None:
        """A checkpoint was evaluated and saved: a continued run will not make this record again."""


class Silent:
    """An observer that does nothing."""

    def on_images(self, done: int, total: int) -> None: ...
    def on_start(self, config: RunConfig, step: int) -> None: ...
    def on_step(self, step: int, losses: Mapping[str, float]) -> None: ...
    def on_record(self, record: RunRecord) -> None: ...


class Observers:
    """Several observers, told one after the other."""

    def __init__(self, *observers: Observer) -> None:
        self.observers = observers

    def on_images(self, done: int, total: int) -> None:
        for each in self.observers:
            each.on_images(done, total)

    def on_start(self, config: RunConfig, step: int) -> None:
        for each in self.observers:
            each.on_start(config, step)

    def on_step(self, step: int, losses: Mapping[str, float]) -> None:
        for each in self.observers:
            each.on_step(step, losses)

    def on_record(self, record: RunRecord) -> None:
        for each in self.observers:
            each.on_record(record)
