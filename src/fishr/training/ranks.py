"""The processes of a run on several devices."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.utilities.rank_zero import rank_zero_only
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from fishr.devices import torch_device
from fishr.errors import ConfigError, FishrError
from fishr.training.config import Precision

T = TypeVar("T")


def is_main_process() -> bool:
    """Whether this process is the one of a run on several devices that writes and speaks."""
    rank: int = rank_zero_only.rank  # type: ignore[attr-defined]  # known from the environment until the processes have met
    return rank == 0


def lost_rank(error: RuntimeError) -> bool:
    """Whether an error says that another rank cannot be reached."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


class Ranks:
    """One process for each device; each calls the same methods in the same order. One device is one rank.

    Args:
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
        precision: That of the run.
        devices: Devices on each machine.
        nodes: Machines.

    Raises:
        ConfigError: there is no such device, or not as many.
    """

    def __init__(self, device: str, precision: Precision, devices: int = 1, nodes: int = 1) -> None:
        for name, value in (("devices", devices), ("nodes", nodes)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        kind = torch_device(device).type
        available = {"cuda": torch.cuda.device_count(), "mps": 1}.get(kind, devices)
        if devices > available:
            raise ConfigError(f"{devices} devices of the kind {kind!r} were asked for, there are {available} here")
        self.number = devices * nodes
        self.fabric = Fabric(
            accelerator=kind,
            devices=devices,
            num_nodes=nodes,
            strategy="ddp" if self.number > 1 else "auto",
            precision="32-true" if precision == "32" else precision,
        )

    def launch(self) -> None:
        """Start the other processes, which run the same program from its beginning, and meet them here.

        Where a cluster's launcher has started them, such as Slurm's or torchrun, they only meet.
        """
        if self.number > 1:
            self.fabric.launch()

    @property
    def index(self) -> int:
        """The rank of this process."""
        return self.fabric.global_rank

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes, rank 0."""
        return self.index == 0

    @property
    def device(self) -> torch.device:
        return self.fabric.device

    def from_main(self, work: Callable[[], T]) -> T:
        """What ``work`` returns on the main rank, on all of them; an error is raised on all of them too."""
        if self.number == 1:
            return work()
        outcome: Any = None
        if self.is_main:
            try:
                outcome = work()
            except (FishrError, OSError) as error:
                outcome = _Failure(error)
        outcome = self.fabric.broadcast(outcome)
        if isinstance(outcome, _Failure):
            raise outcome.error
        result: T = outcome
        return result

    def main_first(self) -> Any:
        """A context that the main rank passes first, the others after it."""
        return nullcontext() if self.number == 1 else self.fabric.rank_zero_first()

    def sums(self, *values: float) -> list[float]:
        """Sums over ranks."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def largest(self, value: float) -> float:
        """The largest of the ranks' values."""
        return self._reduced((value,), dist.ReduceOp.MAX)[0]

    def _reduced(self, values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        if self.number == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, operation)
        reduced: list[float] = tensor.tolist()
        return reduced

    def keep_equal(self, network: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Let each optimizer step on the mean of the ranks' gradients, so that weights stay the same on all ranks.

        Raises:
            ConfigError: a layer of the network has statistics of the batch, which no rank knows whole.
        """
        if self.number == 1:
            return
        for name, module in network.named_modules():
            if isinstance(module, _BatchNorm) and module.training:
                raise ConfigError(
                    f"{name} of the featurizer is a batch-norm layer that learns from its batch, of which each of the "
                    f"{self.number} devices sees a part: freeze it (the default), or train on one device"
                )
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(_average_gradients)


class _Failure:
    """An error on its way to the other ranks."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _average_gradients(optimizer: Optimizer, *_: object) -> None:
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    if not gradients:
        return
    sums = torch.cat([gradient.flatten() for gradient in gradients])  # one message in place of many
    dist.all_reduce(sums)
    means = torch.split(sums / dist.get_world_size(), [gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view(gradient.shape))
