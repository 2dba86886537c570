"""What a sweep takes, from what a run was measured to take."""

from dataclasses import replace

import pytest

from fishr.data import load_dataset
from fishr.sweeps import estimate as module
from fishr.sweeps.estimate import estimate
from fishr.training.loop import RunCost
from small_sweeps import Orders


@pytest.fixture(autouse=True)
def _measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure_cost", lambda *_, **__: RunCost(start=10.0, step=0.5, checkpoint=2.0))


def seconds(made: list, processes: int) -> float:
    return estimate(made, {"colored-digits": load_dataset("colored-digits")}, processes, 1, "cpu").seconds


def test_a_run_is_start_steps_and_checkpoints(orders: Orders) -> None:
    assert seconds(orders("erm"), 1) == pytest.approx(10 + 12 * 0.5 + 3 * 2.0)


def test_more_processes_than_runs_make_nothing_faster(orders: Orders) -> None:
    assert seconds(orders("erm"), 32) == seconds(orders("erm"), 1)
    assert seconds(orders("erm", draws=2)[:1] * 4, 2) == pytest.approx(2 * seconds(orders("erm"), 1))


def test_each_algorithm_is_measured(orders: Orders, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {"erm": 0.5, "fishr": 0.75}
    monkeypatch.setattr(
        module, "measure_cost", lambda config, *_, **__: RunCost(10.0, steps[config.algorithm], checkpoint=2.0)
    )
    assert seconds(orders("erm", "fishr"), 1) == pytest.approx(2 * 16 + 12 * (0.5 + 0.75))


def test_larger_batches_take_longer(orders: Orders) -> None:
    (order,) = orders("erm")
    large = replace(order, config=replace(order.config, hparams=order.config.hparams.updated({"batch_size": 80})))
    assert seconds([order, large], 1) == pytest.approx(2 * 16 + 12 * 0.5 * (1 + 10))


def test_room_is_that_of_records_and_of_models_that_are_kept(orders: Orders) -> None:
    data = {"colored-digits": load_dataset("colored-digits")}
    kept = estimate(orders("erm"), data, 1, 1, "cpu")
    not_kept = estimate([replace(orders("erm")[0], keep_model=False)], data, 1, 1, "cpu")
    assert not_kept.kept == 2_000 + 3 * 1_000
    assert kept.working == not_kept.working == 6 * (kept.kept - not_kept.kept)
