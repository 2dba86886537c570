"""What tests of sweeps share."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fishr.sweeps.runs import Order, Outcome, make_run

Orders = Callable[..., list[Order]]


class Noted:
    """What a sweep says, as texts."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def on_start(self, order: Order) -> None:
        self.said.append(f"start {order.config.algorithm}")

    def on_outcome(self, order: Order, outcome: Outcome) -> None:
        self.said.append(f"{outcome.state} {order.config.algorithm}{outcome.reason and ': '}{outcome.reason}")

    def on_retry(self, order: Order, reason: str) -> None:
        self.said.append(f"retry {order.config.algorithm}: {reason}")


def undisturbed(order: Order, folder: Path) -> Path:
    """The same run, made in this process."""
    assert make_run(replace(order, folder=folder)).state == "done"
    return folder


def has_a_checkpoint(order: Order) -> bool:
    return any((order.folder / "checkpoints").glob("step-*"))


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)
