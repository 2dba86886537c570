"""Runs whose weights lie channels last, as on a GPU, and continue where weights lie otherwise."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fishr.data import MultiDomainDataset
from fishr.errors import RunInterruptedError
from fishr.models import ModelConfig, load_model
from fishr.models.backbone import lay_weights
from fishr.training import AverageConfig, RunConfig, loop, train
from small_runs import signal_at

BACKBONE = ModelConfig("timm", {"name": "test_resnet", "mean": [0.5] * 3, "std": [0.2] * 3, "frozen_batch_norm": True})


def config_of(dataset: MultiDomainDataset) -> RunConfig:
    return RunConfig.for_dataset(
        dataset,
        "fishr",
        test_domains=("street",),
        model=BACKBONE,
        steps=8,
        checkpoint_every=4,
        seed=3,
        select=True,
        average=AverageConfig("ema", {"decay": 0.5}),
        hparams={"batch_size": 4, "lr": 1e-3},
    )


def trained(dataset: MultiDomainDataset, folder: Path) -> dict[str, Tensor]:
    """The weights in the file of the model."""
    assert train(config_of(dataset), dataset, folder, device="cpu").trained
    return load_file(folder / "model/model.safetensors")


@pytest.fixture(scope="module")
def row_major(pictures: MultiDomainDataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return trained(pictures, tmp_path_factory.mktemp("row-major") / "run")


def lay_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "lay_weights", lambda featurizer, _: lay_weights(featurizer, torch.device("cuda")))


@pytest.mark.parametrize(("first", "then"), [(True, True), (True, False), (False, True)])
def test_a_run_is_continued_in_another_layout(
    first: bool,
    then: bool,
    row_major: dict[str, Tensor],
    pictures: MultiDomainDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        if first:
            lay_channels_last(patch)
        with pytest.raises(RunInterruptedError):
            train(config_of(pictures), pictures, folder, device="cpu", observer=signal_at(5))
    if then:
        lay_channels_last(monkeypatch)
    weights = trained(pictures, folder)
    assert list(weights) == list(row_major)
    for name, value in weights.items():
        assert value.is_contiguous()
        torch.testing.assert_close(value, row_major[name], atol=1e-4, rtol=1e-3)
    assert all(value.is_contiguous() for value in load_model(folder).state_dict().values())
