import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fishr.data import load_dataset
from fishr.sweeps.grid import Grid, Source, configs
from fishr.sweeps.runs import Order
from small_sweeps import Orders

SOURCE = Source("colored-digits", options={"subset": 60})
HERE = str(Path(__file__).parent)


@pytest.fixture
def orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Orders:
    """Small runs of algorithms on one held-out domain, those of ``odd_runs`` among them, in ``tmp_path / "runs"``."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (HERE, os.environ.get("PYTHONPATH")))))
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setenv("FISHR_TEST_MARK", str(tmp_path / "mark"))

    def make(*algorithms: str, draws: int = 1, steps: int = 12, runs: Path = tmp_path / "runs") -> list[Order]:
        grid = Grid(
            algorithms, test_domains=("-90%",), draws=draws, trials=1, steps=steps, checkpoint_every=4,
            hparams={"batch_size": 8},
        )  # fmt: skip
        dataset = load_dataset(SOURCE.name, **SOURCE.options)
        return [
            Order(config, SOURCE, runs / config.hash, device="cpu", keep_model=True)
            for config in configs(grid, dataset, None)
        ]

    return make


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A Ray cluster without a node that makes runs."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'fishr[ray]'")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield cluster
    cluster.shutdown()
