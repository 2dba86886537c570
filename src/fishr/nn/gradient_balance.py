"""How much a penalty weighs against the risk, by their gradients."""

import torch
from torch import Tensor, nn

from fishr.errors import ConfigError

DECAY = 0.95


class GradientBalance(nn.Module):
    """The weight λ at which the gradient of a penalty has ρ times the norm of the risk's.

        λ_t = ρ · Σ_s γ^(t−s) ‖∂R_s/∂z_s‖ / Σ_s γ^(t−s) ‖∂P_s/∂z_s‖

    over the steps s ≤ t that were observed, with features z ``[sample, feature]``, risk R, penalty P and γ = 0.95: an
    average over about 20 steps. λ is 0 before the first of them, and where the penalty has no gradient; it is not a
    number from a gradient on that is not finite. Scaling the penalty by a constant leaves λ · P as it is, and where the
    gradient of the risk vanishes λ does too.

    Args:
        strength: ρ, above 0.

    Raises:
        ConfigError: ρ is not above 0.

    >>> balance = GradientBalance(strength=0.5)
    >>> features = torch.tensor([[1.0, 2.0]], requires_grad=True)
    >>> balance.observe(features, risk=8 * features.sum(), penalty=features.sum())
    >>> balance.weight()
    tensor(4.)
    """

    risk_norm: Tensor
    penalty_norm: Tensor

    def __init__(self, strength: float) -> None:
        super().__init__()
        if strength <= 0:
            raise ConfigError(f"strength must be above 0, got {strength}")
        self.strength = strength
        self.register_buffer("risk_norm", torch.zeros(()))
        self.register_buffer("penalty_norm", torch.zeros(()))

    def observe(self, features: Tensor, risk: Tensor, penalty: Tensor) -> None:
        """Add the gradients of one step; the graph of risk and penalty stays."""
        for norm, value in ((self.risk_norm, risk), (self.penalty_norm, penalty)):
            (gradient,) = torch.autograd.grad(
                value, features, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            norm.mul_(DECAY).add_(gradient.float().norm())

    def weight(self) -> Tensor:
        """λ, a scalar."""
        ratio = (self.risk_norm / self.penalty_norm).where(self.penalty_norm != 0, 0.0)
        zero_or_nan = self.penalty_norm - self.penalty_norm
        return self.strength * ratio + zero_or_nan

    def extra_repr(self) -> str:
        return f"strength={self.strength}"
