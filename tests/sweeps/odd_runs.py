"""Algorithms that do odd things in the middle of a run. Processes that make runs import them by name."""

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from torch.optim import Optimizer

from fishr.algorithms import ERM
from fishr.algorithms.base import Losses
from fishr.data import DomainBatch

ODD_STEP = 9


class Odd(ERM):
    """ERM up to a step at which something happens."""

    def training_step(self, batch: DomainBatch, step: int, optimizers: Mapping[str, Optimizer]) -> Losses:
        with Path(f"{os.environ['FISHR_TEST_MARK']}.steps").open("a") as steps:
            steps.write(f"{step} ")
        if step == ODD_STEP:
            self.happen()
        return super().training_step(batch, step, optimizers)

    def happen(self) -> None: ...


class DiesOnce(Odd):
    """Its process is killed, but not the second time: ``$FISHR_TEST_MARK`` is a file that remembers."""

    def happen(self) -> None:
        mark = Path(os.environ["FISHR_TEST_MARK"])
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Waits(Odd):
    """Until there is the file ``$FISHR_TEST_MARK``."""

    def happen(self) -> None:
        while not Path(os.environ["FISHR_TEST_MARK"]).exists():
            time.sleep(0.02)


class DiesAlways(Odd):
    def happen(self) -> None:
        os._exit(7)


class Fails(Odd):
    def happen(self) -> None:
        raise ZeroDivisionError("of two\nlines")


class Spoils(Odd):
    """Fails, and leaves its process in a state in which it fails again."""

    spoiled = False

    def happen(self) -> None:
        if Spoils.spoiled:
            raise RuntimeError("the process was used again")
        Spoils.spoiled = True
        raise ZeroDivisionError
