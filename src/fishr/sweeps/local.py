"""Sweeps on one machine: a process for each slot, with CPUs or a GPU of its own."""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from fishr.devices import num_cpus, torch_device
from fishr.errors import ConfigError, RunError
from fishr.sweeps import worker
from fishr.sweeps.backlog import LEAVE_SECONDS, POLL_SECONDS, Backlog
from fishr.sweeps.runs import Order, Outcome, SweepObserver

MOST_FALSE_STARTS = 3
"""So many processes in a row that die before they begin are no accident."""


@dataclass(frozen=True)
class Slot:
    """What a process has for itself.

    Attributes:
        number: Counted from 0.
        cpus: CPUs that it may use, and so many threads.
        gpu: As CUDA_VISIBLE_DEVICES names it; None for what the environment says.
    """

    number: int
    cpus: tuple[int, ...]
    gpu: str | None = None


def slots(count: int | None, device: str) -> list[Slot]:
    """CPUs and GPUs of this machine dealt out to as many processes; None for one for each GPU, or else each CPU.

    Raises:
        ConfigError: less than one.
    """
    if count is not None and count < 1:
        raise ConfigError(f"slots must be at least 1, got {count}")
    gpus: list[str] = []
    if torch_device(device).type == "cuda":
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(num_cpus()))
    count = count or len(gpus) or len(cpus)
    dealt = [cpus[len(cpus) * number // count : len(cpus) * (number + 1) // count] for number in range(count)]
    return [
        Slot(number, tuple(of_slot or [cpus[number % len(cpus)]]), gpus[number % len(gpus)] if gpus else None)
        for number, of_slot in enumerate(dealt)
    ]


def make_runs(
    orders: Sequence[Order],
    slots: Sequence[Slot],
    observer: SweepObserver,
    *,
    logs: Path,
    retries: int,
    should_stop: Callable[[], bool],
) -> bool:
    """Make the runs that are neither done nor failed.

    A run that another process works on is waited for, and taken over should that one die. What a process writes to
    stderr goes to a file in ``logs``.

    Args:
        orders: The runs.
        slots: The processes.
        observer: Is told what happens.
        logs: Folder for what the processes write.
        retries: How often a run is continued whose process died before it came to another checkpoint.
        should_stop: Asked again and again; once it is true, runs are saved and left.

    Returns:
        Whether all runs are done or failed; False after a stop.

    Raises:
        RunError: processes cannot be started.
    """
    logs.mkdir(parents=True, exist_ok=True)
    return _Driver(orders, slots, observer, logs, retries).drive(should_stop)


@dataclass(frozen=True)
class _Said:
    """An outcome that a worker told; None: it has died."""

    by: "_Worker"
    outcome: Outcome | None


class _Worker:
    """A process of :mod:`fishr.sweeps.worker`."""

    def __init__(self, slot: Slot, logs: Path, events: "queue.SimpleQueue[_Said]") -> None:
        self.slot, self.log, self.events = slot, logs / f"slot-{slot.number}.log", events
        self.order: Order | None = None
        self.is_ready = False
        with self.log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", worker.__name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=_environment(slot),
                start_new_session=True,  # ^C is for us, who let the processes save their runs
            )
        if hasattr(os, "sched_setaffinity"):  # only Linux has it
            os.sched_setaffinity(self.process.pid, slot.cpus)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                if line.endswith("\n"):  # else it was killed while it wrote
                    self.events.put(_Said(self, Outcome(**json.loads(line))))
        self.events.put(_Said(self, None))

    def give(self, order: Order) -> None:
        assert self.process.stdin is not None
        self.order = order
        with suppress(BrokenPipeError):  # it has died, and we shall hear of it
            self.process.stdin.write(json.dumps(order.as_dict()) + "\n")
            self.process.stdin.flush()

    def dismiss(self) -> None:
        """Let it save its run and leave."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def wait(self) -> int:
        """Its exit code, once it has left."""
        try:
            return self.process.wait(LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


class _Driver:
    """Gives orders to workers until there is nothing left to do."""

    def __init__(
        self, orders: Sequence[Order], slots: Sequence[Slot], observer: SweepObserver, logs: Path, retries: int
    ) -> None:
        self.slots, self.logs = slots, logs
        self.backlog = Backlog(orders, observer, retries)
        self.events: queue.SimpleQueue[_Said] = queue.SimpleQueue()
        self.workers: list[_Worker] = []
        self.false_starts = 0

    def drive(self, should_stop: Callable[[], bool]) -> bool:
        self.workers = [_Worker(slot, self.logs, self.events) for slot in self.slots]
        try:
            while not should_stop():
                self._give_orders()
                if not (self.backlog or any(each.order for each in self.workers)):
                    return True
                with suppress(queue.Empty):
                    self._hear(self.events.get(timeout=POLL_SECONDS))
            return False
        finally:
            for each in self.workers:
                each.dismiss()
            for each in self.workers:
                each.wait()

    def _give_orders(self) -> None:
        for each in self.workers:
            if each.is_ready and each.order is None and (order := self.backlog.take()):
                each.give(order)

    def _hear(self, said: _Said) -> None:
        if said.outcome is None:
            self._replace(said.by)
        elif said.by.order is None:
            said.by.is_ready = True
        else:
            order, said.by.order = said.by.order, None
            self.backlog.hear(order, said.outcome)

    def _replace(self, dead: _Worker) -> None:
        """Start another worker in place of one that has died, and continue its run."""
        dead.dismiss()
        code = dead.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"left with exit code {code}"
        self.false_starts = 0 if dead.is_ready else self.false_starts + 1
        if self.false_starts == MOST_FALSE_STARTS:
            raise RunError(f"a process for runs {how} before it began: {dead.log} may say why")
        if dead.order is not None:
            self.backlog.died(dead.order, f"its process {how}")
        self.workers[self.workers.index(dead)] = _Worker(dead.slot, self.logs, self.events)


def _environment(slot: Slot) -> Mapping[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(slot.cpus))}
    if slot.gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = slot.gpu
    return environment
