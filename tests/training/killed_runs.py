"""A program that trains in processes of its own and kills them: ``python killed_runs.py FOLDER``.

It forks, so that torch is imported once; for that to be safe it must be run with ``OMP_NUM_THREADS=1``. The runs of
a job are left in ``FOLDER/NAME``; ``FOLDER/report.json`` tells what happened to them.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fishr.errors import FishrError, RunInterruptedError
from fishr.training import RunConfig, train
from fishr.training.loop import Silent
from small_runs import RUNS, noisy_registered, run_config, small_digits

WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
KILLS_IN_A_ROW = (9, 14, 22, 5, 17)
"""Write at which each process in turn is killed."""
SIGNALS_IN_A_ROW = ((10, signal.SIGKILL), (30, signal.SIGTERM), (50, signal.SIGKILL), (70, signal.SIGINT))
"""Updates after which each process in turn is sent a signal."""

DIGITS = small_digits()


def die_at_write(number: int) -> None:
    """Kill this process right before it changes the file system for the so-manieth time."""
    seen = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event in WRITES or (event == "open" and set(str(arguments[1])) & set("wax+")):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def in_process(job: Callable[[], object]) -> int:
    """Start a process that does the job; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        job()
        code = 0
    except RunInterruptedError as error:
        code = 128 + error.signal_number
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def exit_code(pid: int) -> int:
    """Minus the signal's number for a process that was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_until_write(config: RunConfig, folder: Path, write: int) -> bool:
    """Train until that write; whether the run got there."""

    def job() -> None:
        die_at_write(write)
        train(config, DIGITS, folder, device="cpu")

    return exit_code(in_process(job)) == -signal.SIGKILL


def killed_at_every_write(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Kill a run at its first write and continue it, another at its second, ... until one is through unharmed."""
    write, refused = 1, {}
    while run_until_write(config, folder / f"killed-{write}", write):
        try:
            train(config, DIGITS, folder / f"killed-{write}", device="cpu")
        except FishrError as error:
            refused[write] = str(error)
        write += 1
    return {"kills": write - 1, "refused": refused}


def killed_in_a_row(config: RunConfig, folder: Path) -> dict[str, Any]:
    kills = sum(run_until_write(config, folder / "killed", write) for write in KILLS_IN_A_ROW)
    train(config, DIGITS, folder / "killed", device="cpu")
    return {"kills": kills}


class Telling(Silent):
    """Says how many updates have been made, and after so many slows down, so that the run cannot end meanwhile."""

    def __init__(self, pipe: int, slow_after: int) -> None:
        self.pipe, self.slow_after = pipe, slow_after

    def on_step(self, step: int, losses: Mapping[str, float]) -> None:
        os.write(self.pipe, f"{step}\n".encode())
        if step > self.slow_after:
            time.sleep(0.2)


def stopped_from_outside(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Send a process a signal when it says that it has made so many updates, wherever it has got to by then."""
    codes = []
    for after, number in SIGNALS_IN_A_ROW:
        readable, writable = os.pipe()
        telling = Telling(writable, slow_after=after + 10)
        pid = in_process(partial(train, config, DIGITS, folder / "killed", device="cpu", observer=telling))
        os.close(writable)
        with os.fdopen(readable) as told:
            while int(told.readline()) < after:
                pass
            os.kill(pid, number)
        codes.append(exit_code(pid))
    train(config, DIGITS, folder / "killed", device="cpu")
    return {"codes": codes}


def main(folder: Path) -> None:
    jobs: dict[str, tuple[RunConfig, Callable[[RunConfig, Path], dict[str, Any]]]] = {
        name: (run_config(name), killed_in_a_row) for name in RUNS
    }
    jobs["every-write"] = (run_config("erm", steps=3, checkpoint_every=1), killed_at_every_write)
    jobs["outside"] = (run_config("fishr", steps=100, checkpoint_every=3), stopped_from_outside)
    report = {}
    with noisy_registered():
        for name, (config, job) in jobs.items():
            train(config, DIGITS, folder / name / "undisturbed", device="cpu")
            report[name] = job(config, folder / name)
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
