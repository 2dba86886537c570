"""The Fishr penalty: how far the domains' gradient variances lie from their mean."""

from typing import Any, Literal

import torch
from torch import Tensor

from fishr.errors import ConfigError, InputError

Reduction = Literal["mean", "sum"]


def variance_penalty(variances: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Squared distance of each domain's statistic to the mean over domains.

    ``"mean"``: 1/|E| Σ_e mean over head parameters of (v_e − v̄)²: the scaling of DomainBed's code.
    ``"sum"``: Σ_e ‖v_e − v̄‖²: the scaling of the Colored MNIST script.

    The two differ by the factor |E| · (number of head parameters), and the penalty weight with them.

    Args:
        variances: ``[domain, ...]``, as :func:`domain_gradient_variances` returns them.
        reduction: ``"mean"`` or ``"sum"``.

    Returns:
        A scalar.

    Raises:
        InputError: fewer than two domains.
        ConfigError: an unknown reduction.

    >>> import torch
    >>> variance_penalty(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    tensor(0.5000)
    >>> variance_penalty(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), reduction="sum")
    tensor(2.)
    """
    check_reduction(reduction)
    if variances.ndim == 0 or variances.shape[0] < 2:
        raise InputError(f"variances must be [domain, ...] with at least 2 domains, got {list(variances.shape)}")
    distance: Tensor = _SquaredDistance.apply(variances)
    return distance / variances.numel() if reduction == "mean" else distance


def check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum"):
        raise ConfigError(f"reduction must be 'mean' or 'sum', got {reduction!r}")


class _SquaredDistance(torch.autograd.Function):
    """Σ_e ‖v_e − v̄‖², whose gradient 2 (v_e − v̄) is computed from the variances again.

    Plain operations would keep the differences and several temporaries of the variances' size alive.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(variances: Tensor) -> Tensor:
        differences = variances - variances.mean(0)
        return differences.mul_(differences).sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], _: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        variances: Tensor = ctx.saved_tensors[0]
        return (variances - variances.mean(0)).mul_(2 * grad)
