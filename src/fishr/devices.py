"""What there is to compute on."""

import os

import torch

from fishr.errors import ConfigError
from fishr.registry import unknown


def torch_device(name: str) -> torch.device:
    """The device of that name; ``"auto"`` is the first there is of cuda, mps and cpu.

    Raises:
        ConfigError: a name other than ``"auto"``, ``"cuda"``, ``"mps"`` and ``"cpu"``, or a device that is missing.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device for device, is_there in available.items() if is_there))
    if name not in available:
        raise unknown("device", name, ["auto", *available])
    if not available[name]:
        raise ConfigError(f"device {name!r} is not available here: torch finds none; use 'auto' or 'cpu'")
    return torch.device(name)


def num_cpus() -> int:
    """CPUs that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # only Linux has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1
