"""A Ray cluster of two nodes on one machine, one of which is killed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fishr.errors import ConfigError, RunError
from fishr.sweeps import on_ray
from fishr.sweeps.on_ray import Share, make_runs
from small_runs import outcome
from small_sweeps import Noted, Orders, has_a_checkpoint, undisturbed

pytest.importorskip("ray", reason="Ray is not installed: pip install 'fishr[ray]'")


def test_a_node_and_a_process_are_killed_and_all_runs_end_as_if_they_were_not(
    cluster: Any, orders: Orders, tmp_path: Path
) -> None:
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    made = orders("erm", "fishr", steps=2000) + orders("odd_runs:DiesOnce", "odd_runs:Fails")
    noted = Noted()

    def kill_a_node() -> bool:
        """Once both runs have a checkpoint; it is asked whether to stop, and never says so."""
        if nodes and all(has_a_checkpoint(order) for order in made[:2]):
            cluster.remove_node(nodes.pop(), allow_graceful=False)
            nodes.clear()
        return False

    assert make_runs(made, noted, address=cluster.address, share=Share(cpus=1), retries=2, should_stop=kill_a_node)
    assert sorted(line for line in noted.said if not line.startswith(("start", "retry"))) == [
        "done erm",
        "done fishr",
        "done odd_runs:DiesOnce",
        "failed odd_runs:Fails: ZeroDivisionError: of two lines",
    ]
    retried = [line.split(":")[0] for line in noted.said if line.startswith("retry")]
    assert len(retried) == 2
    assert "retry odd_runs" in retried
    for number, order in enumerate(made[:3]):
        assert outcome(order.folder) == outcome(undisturbed(order, tmp_path / str(number)))


def test_a_stop_saves_the_runs(cluster: Any, orders: Orders, tmp_path: Path) -> None:
    cluster.add_node(num_cpus=1)
    (order,) = made = orders("erm", steps=2000)

    def run(should_stop: Callable[[], bool]) -> bool:
        return make_runs(made, Noted(), address=cluster.address, share=Share(), retries=0, should_stop=should_stop)

    assert not run(lambda: has_a_checkpoint(order))
    assert not (order.folder / "DONE").exists()
    assert not (order.folder / ".lease").exists()
    assert run(lambda: False)
    assert outcome(order.folder) == outcome(undisturbed(order, tmp_path / "alone"))


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:1"])
def test_without_a_cluster(address: str, orders: Orders) -> None:
    with pytest.raises(ConfigError, match=f"there is no Ray cluster to be found at {address}: "):
        make_runs(orders("erm"), Noted(), address=address, share=Share(), retries=0, should_stop=lambda: False)


def test_gpus_of_a_cluster_are_not_left_idle(orders: Orders) -> None:
    nodes = [{"CPU": 4.0, "GPU": 2.0}, {"CPU": 4.0}]
    made = [replace(order, device="auto") for order in orders("erm")]
    with pytest.raises(ConfigError, match=r"the cluster has 2 GPUs: say how many a run takes \(--gpus-per-run 0\.5"):
        on_ray._check_share(nodes, Share(), made)
    on_ray._check_share(nodes, Share(gpus=0.5), made)
    on_ray._check_share(nodes, Share(), orders("erm"))


def test_what_no_node_has_is_waited_for_aloud() -> None:
    with pytest.warns(UserWarning, match="no node of the cluster has the 8 CPUs and 0 GPUs that a run takes"):
        on_ray._check_share([{"CPU": 4.0}, {"CPU": 4.0}], Share(cpus=8), [])


def test_runs_that_nodes_write_elsewhere_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_ray, "APPEAR_SECONDS", 0.0)
    on_ray._check_seen(tmp_path)
    with pytest.raises(RunError, match="DONE is not there: the folder must lie on a file system that all nodes share"):
        on_ray._check_seen(tmp_path / "DONE")


def test_keys_of_trackers_go_to_other_nodes_only_where_runs_are_tracked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker")
    ours = {"WANDB_API_KEY": "secret", "MLFLOW_TRACKING_URI": "http://tracker"}
    assert on_ray._environment(tracked=True).items() >= ours.items()
    assert not on_ray._environment(tracked=False).keys() & ours.keys()


@pytest.mark.parametrize(("cpus", "gpus"), [(0, 0.0), (1, -1.0), (1, 1.5)])
def test_shares_that_no_run_can_have(cpus: int, gpus: float) -> None:
    with pytest.raises(ConfigError, match="-per-run must be"):
        Share(cpus, gpus)
