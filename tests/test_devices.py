import pytest
import torch
from lightning_fabric.accelerators import MPSAccelerator

from fishr.devices import torch_device
from fishr.errors import ConfigError
from fishr.training.ranks import Ranks


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_takes_an_accelerator_first(cuda: bool, mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.mps, "is_available", lambda: mps)
    assert torch_device("auto") == torch.device(expected)


def test_half_precision_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "is_available", lambda: True)
    monkeypatch.setattr(MPSAccelerator, "is_available", lambda: True)
    for name in ("mps", "cpu"):
        ranks = Ranks(name, "bf16-mixed")
        assert ranks.device.type == name
        with ranks.fabric.autocast():
            assert torch.is_autocast_enabled(name)
            assert torch.get_autocast_dtype(name) == torch.bfloat16


def test_what_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device 'cuda' is not available here: torch finds none; use 'auto' or 'cpu'"):
        torch_device("cuda")
    with pytest.raises(ConfigError, match=r"unknown device 'cud'; did you mean 'cuda'\?"):
        torch_device("cud")
