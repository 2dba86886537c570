"""A process that makes runs, one after the other: ``python -m fishr.sweeps.worker``, for :mod:`fishr.sweeps.local`.

Orders come as lines of JSON on stdin, outcomes go as lines of JSON to what was stdout. When stdin ends, whoever started
the process is gone: the run at hand is saved and the process leaves. It leaves after a failure too.
"""

import json
import os
import queue
import signal
import sys
import threading
from dataclasses import asdict


def main() -> None:
    outcomes = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no outcome

    from fishr.sweeps.runs import Order, Outcome, make_run

    orders: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    busy, deserted = threading.Event(), threading.Event()

    def receive() -> None:
        for line in sys.stdin:
            orders.put(line)
        deserted.set()
        orders.put(None)
        if busy.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    def say(outcome: Outcome) -> None:
        outcomes.write(f"{json.dumps(asdict(outcome))}\n")

    threading.Thread(target=receive, daemon=True).start()
    say(Outcome("ready"))
    while (line := orders.get()) is not None:
        busy.set()
        if deserted.is_set():
            break
        outcome = make_run(Order.from_dict(json.loads(line)))
        busy.clear()
        say(outcome)
        if outcome.state == "failed":  # a CUDA error, say, would fail all further runs of the process
            break


if __name__ == "__main__":
    main()
