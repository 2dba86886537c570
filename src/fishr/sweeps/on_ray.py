"""Sweeps on a Ray cluster: a task for each run; the nodes share the file system that the runs lie on."""

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fishr.errors import ConfigError
from fishr.sweeps.backlog import Backlog
from fishr.sweeps.runs import Order, Outcome, SweepObserver, make_run

POLL_SECONDS = 0.5
"""How often it is looked whether to stop."""

LEAVE_SECONDS = 300.0
"""How long runs may take to be saved after a stop."""

MOST_SUBMITTED = 1000
"""Tasks that wait in the cluster at a time; the others wait here."""


@dataclass(frozen=True)
class Share:
    """What a run takes of a node.

    Attributes:
        cpus: CPUs, and so many threads.
        gpus: GPUs; of 0.5 each, two runs share one.
    """

    cpus: int = 1
    gpus: float = 0.0


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
        retries: How often a run is continued whose process or node died.
        should_stop: Asked again and again; once it is true, runs are saved and left.

    Returns:
        Whether all runs are done or failed; False after a stop.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError("--executor ray needs Ray: pip install 'fishr[ray]'") from None
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, runtime_env={"env_vars": _environment()}, log_to_driver=False)
    except ConnectionError as error:
        raise ConfigError(
            f"there is no Ray cluster to be found{f' at {address}' if address else ''}: {error}"
        ) from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray has put its own in place, which would leave without saving
    gpus = sum(node["Resources"].get("GPU", 0) for node in ray.nodes())  # type: ignore[no-untyped-call]
    if gpus and not share.gpus and any(order.device != "cpu" for order in orders):
        ray.shutdown()
        raise ConfigError(
            f"the cluster has {gpus:.0f} GPUs: say how many a run takes (--gpus-per-run 0.5: two runs share one), or "
            "--device cpu"
        )
    task = ray.remote(_make_run).options(num_cpus=share.cpus, num_gpus=share.gpus, max_retries=0)
    backlog = Backlog(orders, observer, retries)
    submitted: dict[Any, Order] = {}

    def hear_of_one() -> None:
        for reference in ray.wait(list(submitted), timeout=POLL_SECONDS)[0]:
            order = submitted.pop(reference)
            try:
                outcome = ray.get(reference)
            except ray.exceptions.TaskCancelledError:
                backlog.hear(order, Outcome("stopped"))
            except ray.exceptions.RayError as error:  # of process or node: a run's own failure is an outcome
                backlog.died(order, f"its process died ({type(error).__name__})")
            else:
                backlog.hear(order, Outcome(**outcome))

    try:
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


def _make_run(order: Mapping[str, Any]) -> dict[str, Any]:
    return asdict(make_run(Order.from_dict(order)))


def _environment() -> dict[str, str]:
    """What processes on other nodes need to know of ours."""
    return {name: value for name, value in os.environ.items() if name.startswith("FISHR_") or name == "PYTHONPATH"}
