"""Algorithms whose second rank leaves in the middle of a run, once, in a module that command lines can name."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from torch.optim import Optimizer

from fishr.algorithms import Fishr, Losses
from fishr.data import DomainBatch

MARK = "FISHR_TEST_MARK"
"""Variable with the path of a file that tells that it has left before."""

LEAVES_AFTER = 6


class Interrupted(Fishr):
    """A signal comes to the second rank."""

    number = signal.SIGTERM

    def training_step(self, batch: DomainBatch, step: int, optimizers: Mapping[str, Optimizer]) -> Losses:
        mark = Path(os.environ[MARK])
        if step + 1 == LEAVES_AFTER and batch.num_ranks > 1 and not mark.exists() and dist.get_rank() == 1:
            mark.touch()
            os.kill(os.getpid(), self.number)
        return super().training_step(batch, step, optimizers)


class Killed(Interrupted):
    """The second rank is killed."""

    number = signal.SIGKILL
