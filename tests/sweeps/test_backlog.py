"""Which run is next, and when there is no further try."""

from dataclasses import replace
from pathlib import Path

import pytest

from fishr.sweeps import backlog
from fishr.sweeps.backlog import Backlog
from fishr.sweeps.runs import Outcome, make_run
from small_sweeps import Noted, Orders


def reach(folder: Path, step: int) -> None:
    (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)


def test_a_run_whose_process_dies_again_and_again_without_progress_has_failed(orders: Orders) -> None:
    first, second = orders("erm", "fishr")
    waiting = Backlog([first, second], noted := Noted(), retries=2)
    for _ in range(3):
        assert waiting.take() == first
        waiting.died(first, "its node is gone")
    assert waiting.take() == second
    assert noted.said == [
        "start erm",
        *(2 * ["retry erm: its node is gone", "start erm"]),
        "failed erm: its node is gone; so often: 3",
        "start fishr",
    ]


def test_a_run_that_came_to_another_checkpoint_is_tried_again(orders: Orders) -> None:
    (order,) = orders("erm")
    waiting = Backlog([order], noted := Noted(), retries=1)
    for step in range(4):
        assert waiting.take() == order
        reach(order.folder, step)
        waiting.died(order, "it was preempted")
    assert not any(line.startswith("failed") for line in noted.said)


def test_a_run_that_another_process_works_on_comes_later(orders: Orders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog, "BUSY_SECONDS", 0.0)
    first, second = orders("erm", "fishr")
    waiting = Backlog([first, second], Noted(), retries=0)
    assert waiting.take() == first
    waiting.hear(first, Outcome("busy"))
    assert [waiting.take(), waiting.take(), waiting.take()] == [second, first, None]
    assert not waiting


def test_models_kept_are_kept_by_a_call_that_keeps_none(orders: Orders) -> None:
    (order,) = orders("erm")
    make_run(order)
    without = replace(order, keep_model=False)
    assert Backlog([without], noted := Noted(), retries=0).take() is None
    assert make_run(without) == Outcome("done")
    assert noted.said == ["done erm"]
    assert (order.folder / "model" / "model.safetensors").exists()
