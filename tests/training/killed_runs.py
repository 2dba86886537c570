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

from fishr.data import MultiDomainDataset, load_dataset
from fishr.errors import FishrError, RunInterruptedError
from fishr.training import RunConfig, train
from fishr.training.loop import Silent
from small_runs import RUNS, noisy_registered, picture_config, run_config, small_digits, write_pictures

WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
KILLS_IN_A_ROW = (9, 14, 22, 5, 17)
"""Write at which each process in turn is killed."""
SIGNALS_IN_A_ROW = ((10, signal.SIGKILL), (30, signal.SIGTERM), (50, signal.SIGKILL), (70, signal.SIGINT))
"""Updates after which each process in turn is sent a signal."""

KILLED_PICTURE_RUNS = ("fishr", "swad", "select-sma")


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


def run_to_the_end(config: RunConfig, data: MultiDomainDataset, folder: Path) -> None:
    """Train in a process of its own: threads that read images do not outlive a fork."""
    assert exit_code(in_process(partial(train, config, data, folder, device="cpu"))) == 0


def run_until_write(config: RunConfig, data: MultiDomainDataset, folder: Path, write: int) -> bool:
    """Train until that write; whether the run got there."""

    def job() -> None:
        die_at_write(write)
        train(config, data, folder, device="cpu")

    return exit_code(in_process(job)) == -signal.SIGKILL


def killed_at_every_write(config: RunConfig, data: MultiDomainDataset, folder: Path) -> dict[str, Any]:
    """Kill a run at its first write and continue it, another at its second, ... until one is through unharmed."""
    write, refused = 1, {}
    while run_until_write(config, data, folder / f"killed-{write}", write):
        try:
            train(config, data, folder / f"killed-{write}", device="cpu")
        except FishrError as error:
            refused[write] = str(error)
        write += 1
    return {"kills": write - 1, "refused": refused}


def killed_in_a_row(config: RunConfig, data: MultiDomainDataset, folder: Path) -> dict[str, Any]:
    kills = sum(run_until_write(config, data, folder / "killed", write) for write in KILLS_IN_A_ROW)
    run_to_the_end(config, data, folder / "killed")
    return {"kills": kills}


class Telling(Silent):
    """Says how many updates have been made, and after so many slows down, so that the run cannot end meanwhile."""

    def __init__(self, pipe: int, slow_after: int) -> None:
        self.pipe, self.slow_after = pipe, slow_after

    def on_step(self, step: int, losses: Mapping[str, float]) -> None:
        os.write(self.pipe, f"{step}\n".encode())
        if step > self.slow_after:
            time.sleep(0.2)


def stopped_from_outside(config: RunConfig, data: MultiDomainDataset, folder: Path) -> dict[str, Any]:
    """Send a process a signal when it says that it has made so many updates, wherever it has got to by then."""
    codes = []
    for after, number in SIGNALS_IN_A_ROW:
        readable, writable = os.pipe()
        telling = Telling(writable, slow_after=after + 10)
        pid = in_process(partial(train, config, data, folder / "killed", device="cpu", observer=telling))
        os.close(writable)
        with os.fdopen(readable) as told:
            while int(told.readline()) < after:
                pass
            os.kill(pid, number)
        codes.append(exit_code(pid))
    run_to_the_end(config, data, folder / "killed")
    return {"codes": codes}


Job = Callable[[RunConfig, MultiDomainDataset, Path], dict[str, Any]]


def main(folder: Path) -> None:
    digits = small_digits()
    pictures = load_dataset(str(write_pictures(folder / "data" / "pictures")), image_size=16, cache="none")
    jobs: dict[str, tuple[RunConfig, MultiDomainDataset, Job]] = {
        name: (run_config(name), digits, killed_in_a_row) for name in RUNS
    }
    jobs |= {
        f"pictures-{name}": (picture_config(pictures, name), pictures, killed_in_a_row) for name in KILLED_PICTURE_RUNS
    }
    jobs["every-write"] = (run_config("erm", steps=3, checkpoint_every=1), digits, killed_at_every_write)
    # In this trial the second checkpoint is better than the first.
    selecting = run_config("erm", steps=2, checkpoint_every=1, select=True, trial=3)
    jobs["every-write-select"] = (selecting, digits, killed_at_every_write)
    jobs["outside"] = (run_config("fishr", steps=100, checkpoint_every=3), digits, stopped_from_outside)
    # A killed process loses nothing that it wrote; to wait for the disk would take most of the time.
    os.fsync = lambda descriptor: None
    report = {}
    with noisy_registered():
        for name, (config, data, job) in jobs.items():
            run_to_the_end(config, data, folder / name / "undisturbed")
            report[name] = job(config, data, folder / name)
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
