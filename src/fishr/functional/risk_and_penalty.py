"""Risk and Fishr penalty of a linear head under cross-entropy in one operation, with the gradients of both.

The same numbers as the mean loss of the head's logits, and as :func:`variance_penalty` of
:func:`domain_gradient_variances` of :func:`loss_residuals`. Those make some sixty calls, forward and backward, which on
a small network take longer than the arithmetic. With features f, logits z = f Wᵀ + b, probabilities p = softmax(z) and
residuals r = p − onehot(y):

    ∂risk/∂z = r / n        ∂penalty/∂z = p∘(q − Σ_k p_k q_k), q = ∂penalty/∂r
    ∂/∂f = ∂/∂z W, for the penalty plus its direct ∂/∂f        ∂/∂W = (∂/∂z)ᵀ f        ∂/∂b = Σ_i ∂/∂z_i

q and the direct ∂/∂f are those of :mod:`fishr.functional.variance`, computed once however often the penalty is
differentiated: to measure its gradient, and to follow it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fishr.functional.penalty import Reduction
from fishr.functional.variance import stacked, stacked_gradients, stacked_moments


def risk_and_penalty(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    num_domains: int,
    *,
    history: Tensor | float = 0.0,
    reduction: Reduction = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy, the penalty, and the variances that it compares.

    Differentiable once with respect to features, weight and bias. Nothing is checked: :class:`fishr.nn.FishrPenalty`
    calls it where it may be called.

    Args:
        features: ``[sample, feature]`` in the type of the head; as many samples of each domain, domain after domain.
        weight: Of the head, ``[class, feature]``.
        bias: Of the head, ``[class]``.
        targets: int64 ``[sample]``; all count.
        num_domains: Number of domains E.
        history: Added to the variances before they are compared, ``[domain, class, feature]``.
        reduction: As :func:`variance_penalty` takes it.

    Returns:
        Two scalars, and the variances as :func:`domain_gradient_variances` returns them, without gradient.
    """
    result: tuple[Tensor, Tensor, Tensor] = _RiskAndPenalty.apply(
        features, weight, bias, targets, num_domains, history, reduction
    )
    return result


class _RiskAndPenalty(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        num_domains: int,
        history: Tensor | float,
        reduction: Reduction,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_samples = len(features)
        log_probabilities = F.linear(features, weight, bias).log_softmax(1)
        classes = targets.unsqueeze(1)
        risk = -log_probabilities.gather(1, classes).mean()
        probabilities = log_probabilities.exp_()
        residuals = probabilities.scatter_add(1, classes, probabilities.new_full((num_samples, 1), -1.0))

        h, r = stacked(features, residuals, num_domains, bias=bias is not None)
        counts = features.new_full((num_domains,), num_samples // num_domains)
        variances, means = stacked_moments(h, r, counts)
        variances.addcmul_(means, means, value=-1)
        differences = variances + history
        differences -= differences.mean(0)
        scale = 1 / differences.numel() if reduction == "mean" else 1.0

        ctx.save_for_backward(features, weight, probabilities, residuals, h, means, counts, differences)
        ctx.scale, ctx.of_penalty = scale, None
        ctx.mark_non_differentiable(variances)
        ctx.set_materialize_grads(False)
        return risk, differences.square().sum() * scale, variances

    @staticmethod
    def backward(
        ctx: Any, of_risk: Tensor | None, of_penalty: Tensor | None, _: None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("risk and penalty in one operation are differentiable once, not with create_graph=True")
        features, weight, probabilities, residuals, h, means, counts, differences = ctx.saved_tensors
        grad_logits, grad_features = torch.zeros_like(residuals), None
        if of_risk is not None:
            grad_logits = residuals * (of_risk / len(residuals))
        if of_penalty is not None:
            if ctx.of_penalty is None:
                r = residuals.view(*h.shape[:2], -1)
                direct, q = stacked_gradients(differences * (2 * ctx.scale), h, r, means, counts)
                through = q.view_as(residuals) * probabilities
                through.addcmul_(probabilities, through.sum(1, keepdim=True), value=-1)
                ctx.of_penalty = direct[:, :, : features.shape[1]].reshape(features.shape), through
            direct, through = ctx.of_penalty
            grad_logits = torch.addcmul(grad_logits, through, of_penalty)
            grad_features = direct * of_penalty
        of_features, of_weight, of_bias = ctx.needs_input_grad[:3]
        if of_features:
            grad_features = grad_logits @ weight if grad_features is None else grad_features.addmm_(grad_logits, weight)
        return (
            grad_features if of_features else None,
            grad_logits.T @ features if of_weight else None,
            grad_logits.sum(0) if of_bias else None,
            None,
            None,
            None,
            None,
        )
