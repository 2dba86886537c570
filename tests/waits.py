"""A watch for what would make the host wait for an accelerator, on machines that have none."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ACCELERATOR = torch.device("meta")
"""It stands for an accelerator: whoever asks its tensors for a value, or for a shape that depends on values, fails."""

COPIES = ("aten::_to_copy", "aten::copy_")


class Watch(TorchDispatchMode):
    """Raises where a tensor of the host goes to the accelerator, which waits for the copy.

    Not where the copy is said to be non-blocking, nor where it is a single number, which a kernel takes as an argument.

    Attributes:
        dtypes: The types of what was computed on the accelerator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, operator: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        name, given = operator._schema.name, tensors((args, kwargs))
        from_host = [value for value in given if value.device.type == "cpu"]
        on_device = any(value.device == ACCELERATOR for value in [*given, *tensors(result)])
        self.dtypes |= {value.dtype for value in tensors(result) if value.device == ACCELERATOR}
        arguments = dict(zip((argument.name for argument in operator._schema.arguments), args, strict=False))
        waits = not (arguments | (kwargs or {})).get("non_blocking") if name in COPIES else any(map(rank, from_host))
        if on_device and from_host and waits:
            raise AssertionError(f"{name} brings a tensor {list(from_host[0].shape)} of the host to the device")
        return result


class WatchConstructors(TorchFunctionMode):
    """Raises where values of Python become a tensor of the accelerator: they are copied there too."""

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and result.device == ACCELERATOR:
            raise AssertionError(f"{function.__name__} brings values of the host to the device")
        return result


def tensors(tree: object) -> list[Tensor]:
    return [value for value in tree_leaves(tree) if isinstance(value, Tensor)]


def rank(value: Tensor) -> int:
    return value.ndim


@contextmanager
def watched() -> Iterator[Watch]:
    """Raises where the host would wait inside."""
    optimizers = importlib.import_module("torch.optim.optimizer")
    with pytest.MonkeyPatch.context() as patch, Watch() as watch, WatchConstructors():
        # Neither knows the device.
        patch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
        patch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: [ACCELERATOR.type])
        yield watch
