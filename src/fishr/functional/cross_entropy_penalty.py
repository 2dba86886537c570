"""Fishr penalty of small batches under cross-entropy in one operation, forward and backward.

The same numbers as :func:`variance_penalty` of :func:`domain_gradient_variances` of :func:`loss_residuals`. Those make
some fifty calls, which on a small network take longer than the arithmetic. With features f, logits z, probabilities
p = softmax(z) and residuals r = p − onehot(y):

    ∂penalty/∂z = p∘(q − Σ_k p_k q_k), q = ∂penalty/∂r

q and ∂penalty/∂f are those of :mod:`fishr.functional.variance`, computed once however often the penalty is
differentiated: to measure its gradient, and to follow it.
"""

from typing import Any

import torch
from torch import Tensor

from fishr.functional.penalty import Reduction
from fishr.functional.variance import stacked, stacked_gradients, stacked_moments


def cross_entropy_penalty(
    features: Tensor,
    logits: Tensor,
    targets: Tensor,
    num_domains: int,
    *,
    bias: bool,
    mask: Tensor | None = None,
    history: Tensor | float = 0.0,
    reduction: Reduction = "mean",
) -> tuple[Tensor, Tensor]:
    """The penalty, and the variances that it compares.

    Differentiable once with respect to features and logits. Nothing is checked: :class:`fishr.nn.FishrPenalty` calls it
    where it may be called.

    Args:
        features: ``[sample, feature]``; as many samples of each domain, domain after domain.
        logits: ``[sample, class]`` in float32 or float64.
        targets: int64 ``[sample]``.
        num_domains: Number of domains E.
        bias: Whether the head has a bias.
        mask: ``[sample]`` bool, False for samples that leave their domain (ignored targets); default all count.
        history: Added to the variances before they are compared, ``[domain, class, feature]``.
        reduction: As :func:`variance_penalty` takes it.

    Returns:
        A scalar, and the variances as :func:`domain_gradient_variances` returns them, without gradient.
    """
    result: tuple[Tensor, Tensor] = _CrossEntropyPenalty.apply(
        features, logits, targets, num_domains, bias, mask, history, reduction
    )
    return result


class _CrossEntropyPenalty(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        logits: Tensor,
        targets: Tensor,
        num_domains: int,
        bias: bool,
        mask: Tensor | None,
        history: Tensor | float,
        reduction: Reduction,
    ) -> tuple[Tensor, Tensor]:
        probabilities = logits.softmax(1)
        labels = (targets if mask is None else targets.where(mask, 0)).unsqueeze(1)
        residuals = probabilities.scatter_add(1, labels, probabilities.new_full((len(targets), 1), -1.0))
        if mask is not None:
            residuals *= mask.unsqueeze(1)
        h, r = stacked(features, residuals, num_domains, bias=bias)
        if mask is None:
            counts = h.new_full((num_domains,), len(targets) // num_domains)
        else:
            counts = mask.view(num_domains, -1).sum(1, dtype=h.dtype)
        variances, means = stacked_moments(h, r, counts)
        variances.addcmul_(means, means, value=-1)
        differences = variances + history
        differences -= differences.mean(0)
        scale = 1 / differences.numel() if reduction == "mean" else 1.0

        ctx.save_for_backward(features, logits, probabilities, mask, h, r, means, counts, differences)
        ctx.scale, ctx.gradients = scale, None
        ctx.mark_non_differentiable(variances)
        ctx.set_materialize_grads(False)
        return differences.square().sum() * scale, variances

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, _: None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None, None]:
        features, logits, probabilities, mask, h, r, means, counts, differences = ctx.saved_tensors
        if grad is None:
            return None, None, None, None, None, None, None, None
        with torch.no_grad(), torch.autocast(h.device.type, enabled=False):
            if ctx.gradients is None:
                of_variances = (differences * (2 * ctx.scale)).to(h.dtype)
                of_features, q = stacked_gradients(of_variances, h, r, means, counts)
                of_logits = q.view_as(probabilities).to(probabilities.dtype) * probabilities
                of_logits.addcmul_(probabilities, of_logits.sum(1, keepdim=True), value=-1)
                if mask is not None:
                    of_logits *= mask.unsqueeze(1)
                ctx.gradients = of_features[:, :, : features.shape[1]].reshape(features.shape), of_logits
            # Not rounded before they are scaled: in half precision small gradients would vanish.
            of_features, of_logits = (gradient * grad for gradient in ctx.gradients)
            of_features = of_features.to(features.dtype)
        if torch.is_grad_enabled():
            of_features, of_logits = (_Once.apply(gradient, features, logits) for gradient in (of_features, of_logits))
        return of_features, of_logits, None, None, None, None, None, None


class _Once(torch.autograd.Function):
    """A gradient that is not to be taken for a constant where it is differentiated again."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *of: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("the Fishr penalty is differentiable once")
