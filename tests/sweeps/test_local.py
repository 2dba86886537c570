"""Runs in processes of their own, which die, fail and are stopped."""

import json
import os
import queue
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fishr.errors import ConfigError, RunError
from fishr.sweeps import backlog, local
from fishr.sweeps.grid import Source
from fishr.sweeps.local import Slot
from fishr.sweeps.runs import Order, Outcome, make_run
from small_runs import outcome
from small_sweeps import Noted, Orders, has_a_checkpoint, undisturbed, wait_for

ALL_CPUS = tuple(os.sched_getaffinity(0))


def make_runs(
    orders: list[Order],
    slots: int = 1,
    retries: int = 2,
    should_stop: Callable[[], bool] = lambda: False,
    noted: Noted | None = None,
) -> list[str]:
    noted = noted or Noted()
    logs = orders[0].folder.parents[1] / "logs"
    local.make_runs(
        orders,
        [Slot(number, ALL_CPUS) for number in range(slots)],
        noted,
        logs=logs,
        retries=retries,
        should_stop=should_stop,
    )
    return noted.said


def test_runs_are_what_they_are_alone(orders: Orders, tmp_path: Path) -> None:
    made = orders("erm", "fishr", draws=2)
    said = make_runs(made, slots=2)
    assert sorted(said) == ["done erm"] * 2 + ["done fishr"] * 2 + ["start erm"] * 2 + ["start fishr"] * 2
    for number, order in enumerate(made):
        assert outcome(order.folder) == outcome(undisturbed(order, tmp_path / str(number)))
    assert make_runs(made) == [f"done {order.config.algorithm}" for order in made]


def test_a_run_whose_process_is_killed_is_continued(orders: Orders, tmp_path: Path) -> None:
    """From its checkpoint: with the same bits as one that nobody killed."""
    (order,) = made = orders("odd_runs:DiesOnce")
    assert make_runs(made) == [
        "start odd_runs:DiesOnce",
        "retry odd_runs:DiesOnce: its process was killed by signal 9",
        "start odd_runs:DiesOnce",
        "done odd_runs:DiesOnce",
    ]
    assert (tmp_path / "mark.steps").read_text().split() == [*map(str, range(10)), "8", "9", "10", "11"]
    assert outcome(order.folder) == outcome(undisturbed(order, tmp_path / "alone"))


def test_a_process_in_which_a_run_failed_makes_no_other(orders: Orders) -> None:
    said = make_runs(orders("odd_runs:Spoils", draws=2))
    failed = [line for line in said if line.startswith("failed")]
    assert failed == 2 * ["failed odd_runs:Spoils: ZeroDivisionError:"]


def test_a_failure_is_that_runs_only(orders: Orders) -> None:
    made = orders("odd_runs:Fails", "odd_runs:DiesAlways", "erm")
    said = make_runs(made, retries=1)
    assert said[1] == "failed odd_runs:Fails: ZeroDivisionError: of two lines"
    assert said[-3:-2] == ["failed odd_runs:DiesAlways: its process left with exit code 7; so often: 2"]
    assert said[-1] == "done erm"
    *traceback, reason = (made[0].folder / "FAILED").read_text().splitlines()
    assert reason == "ZeroDivisionError: of two lines"
    assert any("in happen" in line for line in traceback)
    assert make_runs(made, noted=(again := Noted())) == again.said
    assert [line.split(":")[0] for line in again.said] == ["failed odd_runs", "failed odd_runs", "done erm"]


def test_a_failed_run_is_made_when_its_failure_is_forgotten(orders: Orders, tmp_path: Path) -> None:
    (order,) = made = orders("erm")
    broken = replace(order, source=Source("colored-digitz"))
    assert make_runs([broken])[-1].startswith("failed erm: unknown dataset 'colored-digitz'; did you mean")
    (order.folder / "FAILED").unlink()
    assert make_runs(made)[-1] == "done erm"


def test_a_stop_saves_the_run_and_the_next_call_continues_it(orders: Orders, tmp_path: Path) -> None:
    (order,) = made = orders("erm", steps=600)
    assert make_runs(made, should_stop=lambda: has_a_checkpoint(order)) == ["start erm"]
    assert not (order.folder / "DONE").exists()
    assert make_runs(made) == ["start erm", "done erm"]
    assert outcome(order.folder) == outcome(undisturbed(order, tmp_path / "alone"))


def test_when_the_driver_is_killed_its_processes_save_their_runs_and_leave(orders: Orders, tmp_path: Path) -> None:
    (order,) = made = orders("erm", steps=600)
    (tmp_path / "order.json").write_text(json.dumps(order.as_dict()))
    script = textwrap.dedent(
        f"""
        import json
        from pathlib import Path
        from fishr.sweeps.local import Slot, make_runs
        from fishr.sweeps.runs import Order

        class Silent:
            def on_start(self, order): ...
            def on_outcome(self, order, outcome): ...
            def on_retry(self, order, reason): ...

        order = Order.from_dict(json.loads(Path({str(tmp_path / "order.json")!r}).read_text()))
        make_runs([order], [Slot(0, (0,))], Silent(), logs=Path({str(tmp_path / "logs")!r}), retries=0,
                  should_stop=lambda: False)
        """
    )
    driver = subprocess.Popen([sys.executable, "-c", script])
    wait_for(lambda: has_a_checkpoint(order))
    driver.kill()
    driver.wait()
    wait_for(lambda: not (order.folder / ".lease").exists())
    assert not (order.folder / "DONE").exists()
    assert make_runs(made) == ["start erm", "done erm"]
    assert outcome(order.folder) == outcome(undisturbed(order, tmp_path / "alone"))


def test_a_run_that_another_process_works_on_is_waited_for(
    orders: Orders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two drivers on the same runs: each run is made once."""
    monkeypatch.setattr(backlog, "BUSY_SECONDS", 0.5)
    made = orders("odd_runs:Waits", "fishr")

    class LetsGo(Noted):
        def on_outcome(self, order: Order, outcome: Outcome) -> None:
            super().on_outcome(order, outcome)
            (tmp_path / "mark").touch()

    command = [sys.executable, "-m", "fishr.sweeps.worker"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdin.write(json.dumps(made[0].as_dict()) + "\n")
        other.stdin.flush()
        wait_for((made[0].folder / ".lease").exists)
        said = make_runs(made, noted=LetsGo())
        other.stdin.close()
        assert [json.loads(line)["state"] for line in other.stdout] == ["ready", "done"]
    assert said[:3] == ["start odd_runs:Waits", "start fishr", "done fishr"]
    assert said[-1] == "done odd_runs:Waits"


def test_the_model_is_kept_only_where_that_is_asked_for(orders: Orders) -> None:
    (order,) = orders("erm")
    make_run(replace(order, keep_model=False))
    assert sorted(path.name for path in order.folder.iterdir()) == ["DONE", "config.json", "metrics.jsonl"]


def test_a_process_that_cannot_start_says_where_to_look(
    orders: Orders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "json.py").write_text("raise SystemExit(3)")
    with pytest.raises(
        RunError, match=r"a process for runs left with exit code 3 before it began: .*slot-0\.log may say"
    ):
        make_runs(orders("erm"))


def test_a_slot_has_its_own_cpus_and_gpu(tmp_path: Path) -> None:
    cpu = ALL_CPUS[0]
    assert local._environment(Slot(1, (2, 3), "1"))["OMP_NUM_THREADS"] == "2"
    assert local._environment(Slot(1, (2, 3), "1"))["CUDA_VISIBLE_DEVICES"] == "1"
    worker = local._Worker(Slot(0, (cpu,)), tmp_path, queue.SimpleQueue())
    assert os.sched_getaffinity(worker.process.pid) == {cpu}
    worker.dismiss()
    assert worker.wait() == 0


@pytest.mark.parametrize(
    ("count", "cpus", "expected"),
    [
        (2, 4, [(0, 1), (2, 3)]),
        (None, 2, [(0,), (1,)]),
        (2, 3, [(0,), (1, 2)]),
        (3, 2, [(0,), (0,), (1,)]),
    ],
)
def test_cpus_are_dealt_out(
    count: int | None, cpus: int, expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
    assert [slot.cpus for slot in local.slots(count, "cpu")] == expected


def test_gpus_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "torch_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [slot.gpu for slot in local.slots(None, "auto")] == ["0", "1"]
    assert [slot.gpu for slot in local.slots(3, "auto")] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    assert [slot.gpu for slot in local.slots(None, "auto")] == ["3", "GPU-abc"]


def test_a_machine_needs_a_slot() -> None:
    with pytest.raises(ConfigError, match="slots must be at least 1, got 0"):
        local.slots(0, "cpu")
