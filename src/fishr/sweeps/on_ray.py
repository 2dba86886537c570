"""Sweeps on a Ray cluster: a task for each run; the nodes share the file system that the runs lie on."""

import os
import re
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fishr.errors import ConfigError, RunError
from fishr.records import DONE_FILE
from fishr.sweeps.backlog import LEAVE_SECONDS, POLL_SECONDS, Backlog
from fishr.sweeps.runs import Order, Outcome, SweepObserver, make_run, note_failure

APPEAR_SECONDS = 60.0
"""How late a file may be seen that another node has written: network file systems remember what was not there."""

ANSWER_SECONDS = 10.0
"""How long a cluster may take to answer at its address."""

MOST_SUBMITTED = 1000
"""Tasks that wait in the cluster at a time; the others wait here."""


@dataclass(frozen=True)
class Share:
    """What a run takes of a node.

    Attributes:
        cpus: CPUs, and so many threads.
        gpus: GPUs; of 0.5 each, two runs share one.

    Raises:
        ConfigError: numbers that no run can have.
    """

    cpus: int = 1
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.cpus < 1:
            raise ConfigError(f"cpus-per-run must be at least 1, got {self.cpus}")
        if self.gpus < 0 or (self.gpus > 1 and self.gpus != int(self.gpus)):
            raise ConfigError(f"gpus-per-run must be a part of one GPU, or a whole number, got {self.gpus:g}")


def make_runs(
    orders: Sequence[Order],
    observer: SweepObserver,
    *,
    address: str | None,
    share: Share,
    retries: int,
    should_stop: Callable[[], bool],
) -> bool:
    """Make the runs that are neither done nor failed; what :func:`fishr.sweeps.local.make_runs` does on one machine.

    A run whose process or node dies is continued from its checkpoint in another one.

    Args:
        orders: The runs.
        observer: Is told what happens.
        address: Of the cluster; None for the one that this machine belongs to, or else a new one on this machine.
        share: What a run takes of a node.
        retries: How often a run is continued whose process or node died before it came to another checkpoint.
        should_stop: Asked again and again; once it is true, runs are saved and left.

    Returns:
        Whether all runs are done or failed; False after a stop.

    Raises:
        ConfigError: Ray is not installed, there is no cluster at the address, or runs are given none of its GPUs.
        RunError: nodes write where this machine does not see it.
    """
    ray = _connected(address, tracked=any(order.track for order in orders))
    backlog = Backlog(orders, observer, retries)
    submitted: dict[Any, Order] = {}

    def hear_of_one() -> None:
        for reference in ray.wait(list(submitted), timeout=POLL_SECONDS)[0]:
            order = submitted.pop(reference)
            try:
                outcome = ray.get(reference)
            except ray.exceptions.TaskCancelledError:
                backlog.hear(order, Outcome("stopped"))
            except ray.exceptions.RayTaskError as error:
                backlog.hear(order, note_failure(order.folder, _reason(error), str(error)))
            except ray.exceptions.RayError as error:
                backlog.died(order, f"its process died ({type(error).__name__}: {_reason(error)})")
            else:
                if outcome["state"] == "done":
                    _check_seen(order.folder / DONE_FILE)
                backlog.hear(order, Outcome(**outcome))

    try:
        _check_share([node["Resources"] for node in ray.nodes() if node["Alive"]], share, orders)
        # One run a process: a CUDA error, say, would fail all further runs of the process.
        task = ray.remote(num_cpus=share.cpus, num_gpus=share.gpus, max_retries=0, max_calls=1)(_make_run)
        while not should_stop():
            while len(submitted) < MOST_SUBMITTED and (order := backlog.take()):
                submitted[task.remote(order.as_dict())] = order
            if submitted:
                hear_of_one()
            elif backlog:
                time.sleep(POLL_SECONDS)
            else:
                return True
        for reference in submitted:
            ray.cancel(reference)
        until = time.monotonic() + LEAVE_SECONDS
        while submitted and time.monotonic() < until:
            hear_of_one()
        return False
    finally:
        ray.shutdown()


def _connected(address: str | None, *, tracked: bool) -> Any:
    """The module ``ray``, connected to a cluster.

    Raises:
        ConfigError: it is not installed, or there is no cluster at the address.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError("--executor ray needs Ray: pip install 'fishr[ray]'") from None
    handler = signal.getsignal(signal.SIGTERM)
    try:
        host_and_port = re.fullmatch(r"([^:/]+):(\d+)", address or "")
        if host_and_port:  # at an address where nobody answers Ray tries for minutes
            host, port = host_and_port.groups()
            socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
        ray.init(address, runtime_env={"env_vars": _environment(tracked=tracked)}, log_to_driver=False)
    except OSError as error:
        raise ConfigError(
            f"there is no Ray cluster to be found{f' at {address}' if address else ''}: {error}"
        ) from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray has put its own in place, which would leave without saving
    return ray


def _check_share(nodes: Sequence[Mapping[str, float]], share: Share, orders: Sequence[Order]) -> None:
    """Check that runs which could use the cluster's GPUs are given some; warn where no node has what a run takes.

    Raises:
        ConfigError: they are given none.
    """
    gpus = sum(node.get("GPU", 0) for node in nodes)
    if gpus and not share.gpus and any(order.device != "cpu" for order in orders):
        raise ConfigError(
            f"the cluster has {gpus:.0f} GPUs: say how many a run takes (--gpus-per-run 0.5: two runs share one), or "
            "--device cpu"
        )
    if not any(node.get("CPU", 0) >= share.cpus and node.get("GPU", 0) >= share.gpus for node in nodes):
        warnings.warn(
            f"no node of the cluster has the {share.cpus} CPUs and {share.gpus:g} GPUs that a run takes: the runs wait "
            "for one that has",
            stacklevel=3,
        )


def _check_seen(file: Path) -> None:
    """Check that what a node has written is seen here.

    Raises:
        RunError: it is not.
    """
    until = time.monotonic() + APPEAR_SECONDS
    while not file.exists():
        if time.monotonic() > until:
            raise RunError(
                f"a run is done on its node, but {file} is not there: the folder must lie on a file system that all "
                "nodes share"
            )
        time.sleep(POLL_SECONDS)


def _reason(error: Exception) -> str:
    """The last line of what Ray says of an error."""
    return str(error).strip().splitlines()[-1].strip()


def _make_run(order: Mapping[str, Any]) -> dict[str, Any]:
    return asdict(make_run(Order.from_dict(order)))


def _environment(*, tracked: bool) -> dict[str, str]:
    """What processes on other nodes need to know of ours; keys of trackers are among it only where runs are tracked."""
    names = ("FISHR_", "MLFLOW_", "WANDB_") if tracked else ("FISHR_",)
    return {name: value for name, value in os.environ.items() if name.startswith(names) or name == "PYTHONPATH"}
