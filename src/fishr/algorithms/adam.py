"""Adam with all weights in one call."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer


class FusedAdam(Adam):
    """Adam (Kingma and Ba, arXiv 1412.6980) in torch's fused form: one kernel, or one call on a CPU, for all weights.

    The kernel goes through memory, so gradients and moments must lie in it as their weights do. What lies otherwise is
    copied: gradients that were not accumulated by ``backward`` (autograd does this there), and moments that come from a
    checkpoint, which is always row-major. Without that, moments and gradients of other entries would be taken on a CPU,
    and CUDA would refuse.

    Args:
        params: Weights, or groups of them.
        lr: Learning rate.
        betas: Decays β₁ and β₂ of the moments.
        weight_decay: L2 term in the gradient.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, betas, weight_decay=weight_decay, fused=True)
        self.register_step_pre_hook(_lay_gradients)
        self.register_load_state_dict_post_hook(_lay_moments)


def _lay_gradients(optimizer: Optimizer, *_: object) -> None:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight.grad is not None and not _lies_like(weight.grad, weight):
                weight.grad = torch.empty_like(weight).copy_(weight.grad)


def _lay_moments(optimizer: Optimizer) -> None:
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == weight.shape and not _lies_like(value, weight):
                state[name] = torch.empty_like(weight).copy_(value)


def _lies_like(value: Tensor, weight: Tensor) -> bool:
    """Whether entries have the same places in memory; the stride of an axis of one entry says nothing."""
    if value.stride() == weight.stride():
        return True
    places = zip(weight.shape, value.stride(), weight.stride(), strict=True)
    return all(size == 1 or one == other for size, one, other in places)
