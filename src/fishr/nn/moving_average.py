"""The moving average of DomainBed's Fishr code, with its history in a buffer."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, library, nn

from fishr.errors import ConfigError


class MovingAverage(nn.Module):
    """Uncorrected exponential moving average, scaled by 1/(1 − γ).

    ema_t = γ ema_{t−1} + (1 − γ) x_t from ema_0 = 0, and the value returned is

        ema_t / (1 − γ) = x_t + γ/(1 − γ) · ema_{t−1}

    so the gradient with respect to x_t is 1, the history carries none, and over about 1/(1 − γ) steps the
    history term grows to γ/(1 − γ) times x: γ and the penalty weight trade off against each other.

    Calls in ``eval()`` mode or without gradients return the value and leave the history as it is. Casting the module
    to half precision leaves the history in float32.

    Args:
        shape: Shape of the tensors to average.
        decay: γ in [0, 1); 0 returns x_t itself.

    Raises:
        ConfigError: γ outside [0, 1).
    """

    history: Tensor

    def __init__(self, shape: tuple[int, ...], decay: float) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ConfigError(f"the decay of a moving average must lie in [0, 1), got {decay}")
        self.decay = decay
        self.register_buffer("history", torch.zeros(shape))

    def forward(self, value: Tensor) -> Tensor:
        averaged: Tensor = _add_history(value, self.history, self.decay / (1 - self.decay))
        self.update(value)
        return averaged

    def scaled_history(self) -> Tensor:
        """γ/(1 − γ) · ema_{t−1}, what is added to a value."""
        return self.history * (self.decay / (1 - self.decay))

    def update(self, value: Tensor) -> None:
        """Take a value into the history."""
        if self.training and torch.is_grad_enabled():
            self.history.mul_(self.decay).add_(value.detach(), alpha=1 - self.decay)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        history = self.history
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.history.dtype not in (torch.float32, torch.float64):
            self.history = history.to(self.history.device)
        return self

    def extra_repr(self) -> str:
        return f"shape={tuple(self.history.shape)}, decay={self.decay}"


@library.custom_op("fishr::add_history", mutates_args=())
def _add_history(value: Tensor, history: Tensor, factor: float) -> Tensor:
    """Compute value + factor · history as one operator, which a compiled backward pass does not compute again.

    As plain operations the sum may be recomputed in the backward pass, when the buffer already holds the next history:
    compiled gradients were silently wrong (torch 2.15; a test holds this).
    """
    return torch.add(value, history, alpha=factor)


@_add_history.register_fake
def _(value: Tensor, history: Tensor, factor: float) -> Tensor:
    return torch.empty_like(value, dtype=torch.promote_types(value.dtype, history.dtype))


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad, None, None


_add_history.register_autograd(_backward)
