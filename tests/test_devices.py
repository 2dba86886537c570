import pytest
import torch

from fishr.devices import torch_device
from fishr.errors import ConfigError


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_takes_an_accelerator_first(cuda: bool, mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.mps, "is_available", lambda: mps)
    assert torch_device("auto") == torch.device(expected)


def test_what_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device 'cuda' is not available here: torch finds none; use 'auto' or 'cpu'"):
        torch_device("cuda")
    with pytest.raises(ConfigError, match=r"unknown device 'cud'; did you mean 'cuda'\?"):
        torch_device("cud")
