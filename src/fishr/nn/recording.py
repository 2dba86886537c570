"""What the modules of a network were called with in a forward pass."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge


@dataclass(frozen=True)
class Call:
    """A call of a module with one tensor, its first argument, that returned one tensor.

    Attributes:
        inputs: That argument.
        others: The arguments after it.
        keywords: Keyword arguments.
        output: Where the returned tensor lies in the graph; the tensor itself may be changed in place later.
        shape: Its shape.
    """

    inputs: Tensor
    others: tuple[Any, ...]
    keywords: Mapping[str, Any]
    output: GradientEdge
    shape: torch.Size

    def is_of(self, num_samples: int) -> bool:
        """Whether the first dimension of both tensors may be the samples."""
        return self.inputs.shape[:1] == self.shape[:1] == (num_samples,)


class Recording:
    """The calls of all modules of a network, until it is stopped.

    Attributes:
        calls: Name of each module to its calls; None for one with other arguments or results, or outside of the graph.
    """

    def __init__(self, network: nn.Module) -> None:
        self.calls: dict[str, list[Call | None]] = {name: [] for name, _ in network.named_modules()}
        # Before other hooks, which may return something else.
        self._hooks = [
            module.register_forward_hook(partial(_note, self.calls[name]), prepend=True, with_kwargs=True)
            for name, module in network.named_modules()
        ]

    def stop(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _note(
    calls: list[Call | None], module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: object
) -> None:
    first, *others = args or (None,)
    alone = not any(isinstance(value, Tensor) for value in (*others, *keywords.values()))
    if isinstance(first, Tensor) and alone and isinstance(output, Tensor) and output.requires_grad:
        calls.append(Call(first, tuple(others), keywords, get_gradient_edge(output), output.shape))
    else:
        calls.append(None)
