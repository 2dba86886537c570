"""Runs that wait to be made, whoever makes them."""

import time
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path

from fishr.records import DONE_FILE
from fishr.sweeps.folder import failure
from fishr.sweeps.runs import Order, Outcome, SweepObserver, note_failure
from fishr.training.checkpoint import newest_checkpoint
from fishr.training.run_folder import CHECKPOINTS, tidy

POLL_SECONDS = 0.5
"""How often it is looked whether to stop."""

LEAVE_SECONDS = 300.0
"""How long runs may take to be saved after a stop."""

BUSY_SECONDS = 10.0
"""After how long a run is tried again that another process was working on."""


class Backlog:
    """Runs that wait, in order; those that turn out to be done or failed are told the observer and left out.

    Args:
        orders: The runs.
        observer: Is told what happens.
        retries: How often a run is continued whose process died before it came to another checkpoint.
    """

    def __init__(self, orders: Iterable[Order], observer: SweepObserver, retries: int) -> None:
        self.observer, self.retries = observer, retries
        self._deaths: Counter[tuple[Path, Path | None]] = Counter()
        self._waiting = deque(orders)
        self._busy: deque[tuple[float, Order]] = deque()

    def __bool__(self) -> bool:
        return bool(self._waiting or self._busy)

    def take(self) -> Order | None:
        """The next run to make; None where there is none for now."""
        while self._busy and self._busy[0][0] <= time.monotonic():
            self._waiting.append(self._busy.popleft()[1])
        while self._waiting:
            order = self._waiting.popleft()
            if (settled := _settled(order)) is None:
                self.observer.on_start(order)
                return order
            self.observer.on_outcome(order, settled)
        return None

    def hear(self, order: Order, outcome: Outcome) -> None:
        """What became of a run that was taken."""
        if outcome.state == "busy":
            self._busy.append((time.monotonic() + BUSY_SECONDS, order))
        elif outcome.state == "stopped":
            self._waiting.appendleft(order)
        else:
            self.observer.on_outcome(order, outcome)

    def died(self, order: Order, how: str) -> None:
        """The process of a run that was taken has died: the run is the next one again, unless that came too often."""
        reached = order.folder, newest_checkpoint(order.folder / CHECKPOINTS)
        self._deaths[reached] += 1
        if (settled := _settled(order)) is not None:  # it died after the end of the run
            self.observer.on_outcome(order, settled)
        elif self._deaths[reached] > self.retries:
            self.observer.on_outcome(order, note_failure(order.folder, f"{how}; so often: {self._deaths[reached]}"))
        else:
            self.observer.on_retry(order, how)
            self._waiting.appendleft(order)


def _settled(order: Order) -> Outcome | None:
    """What has become of a run, this time or earlier; None where it is still to be made."""
    if (order.folder / DONE_FILE).exists():
        tidy(order.folder)
        return Outcome("done")
    reason = failure(order.folder)
    return None if reason is None else Outcome("failed", reason)
