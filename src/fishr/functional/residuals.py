"""Residuals: the derivative of each sample's loss with respect to its logits.

Cross-entropy, binary cross-entropy and squared error have a closed form; any other loss costs one autograd
call on the logits. The result stays in the graph, because the penalty is differentiated through it.

ℓ_i is the loss of one sample on its own: class weights are not normalised over the batch, several outputs
of binary cross-entropy or squared error are averaged, and the ``reduction`` of a loss module is not used.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fishr.errors import InputError
from fishr.functional.domains import values_may_be_checked

Loss = nn.Module | Callable[[Tensor, Tensor], Tensor]
"""``nn.CrossEntropyLoss``, ``nn.BCEWithLogitsLoss``, ``nn.MSELoss`` or any callable
``(logits, targets) -> losses [sample]``."""


def loss_residuals(loss: Loss, logits: Tensor, targets: Tensor) -> Tensor:
    """∂ℓ_i/∂logits_i for every sample.

    Cross-entropy with target distribution t_i (class weights and label smoothing folded in): p_i Σ_k t_ik − t_i.
    Binary cross-entropy over c outputs: w [(1 − y) σ(z) − pos_weight · y (1 − σ(z))] / c.
    Squared error over c outputs: 2 (z − y) / c.

    Args:
        loss: One of the three modules, or a callable that returns one loss for each sample.
        logits: ``[sample, class]``.
        targets: As the loss takes them.

    Returns:
        ``[sample, class]``, differentiable with respect to the logits.

    Raises:
        InputError: logits or targets of the wrong shape, a class out of range (where looking at values costs no device
            synchronisation), or the callable returned anything but ``[sample]``.

    >>> import torch
    >>> loss_residuals(nn.CrossEntropyLoss(), torch.zeros(1, 2), torch.tensor([0]))
    tensor([[-0.5000,  0.5000]])
    """
    if logits.ndim != 2:
        raise InputError(f"logits must be [sample, class], got {list(logits.shape)}")
    # An exact type: a subclass may compute something else.
    if type(loss) is nn.CrossEntropyLoss:
        check_class_targets(loss, logits.shape, targets)
        probabilities = torch.softmax(logits, dim=1)
        if is_plain_cross_entropy(loss) and samples_that_count(loss, targets) is None:
            return probabilities - _distribution(logits, targets)
        weights = _cross_entropy_target_weights(loss, logits, targets)
        return probabilities * weights.sum(1, keepdim=True) - weights
    if type(loss) is nn.BCEWithLogitsLoss:
        return _binary_cross_entropy_residuals(loss, logits, _like_logits(targets, logits))
    if type(loss) is nn.MSELoss:
        return (logits - _like_logits(targets, logits)) * (2 / logits.shape[1])
    return _autograd_residuals(loss, logits, targets)


def per_sample_losses(loss: Loss, logits: Tensor, targets: Tensor) -> Tensor:
    """ℓ_i ``[sample]``, of which :func:`loss_residuals` is the derivative.

    Raises:
        InputError: as :func:`loss_residuals`.
    """
    if type(loss) is nn.CrossEntropyLoss:
        check_class_targets(loss, logits.shape, targets)
        return F.cross_entropy(
            logits,
            targets,
            weight=loss.weight,
            ignore_index=loss.ignore_index,
            label_smoothing=loss.label_smoothing,
            reduction="none",
        )
    if type(loss) is nn.BCEWithLogitsLoss:
        _check_broadcasts(loss, logits)
        return F.binary_cross_entropy_with_logits(
            logits,
            _like_logits(targets, logits),
            weight=loss.weight,
            pos_weight=loss.pos_weight,
            reduction="none",
        ).mean(1)
    if type(loss) is nn.MSELoss:
        return F.mse_loss(logits, _like_logits(targets, logits), reduction="none").mean(1)
    losses = loss(logits, targets)
    if not isinstance(losses, Tensor) or losses.shape != logits.shape[:1]:
        came = f"a tensor {list(losses.shape)}" if isinstance(losses, Tensor) and losses.ndim else "a scalar"
        raise InputError(
            f"the loss must return one value for each sample, [sample] = [{logits.shape[0]}], but returned {came}; "
            "pass reduction='none' to it, or give nn.CrossEntropyLoss, nn.BCEWithLogitsLoss or nn.MSELoss"
        )
    return losses


def samples_that_count(loss: Loss, targets: Tensor) -> Tensor | None:
    """Samples that the loss does not ignore: bool ``[sample]``, or None when it ignores none.

    Where looking at values would make an accelerator wait, it is None only if the loss could not ignore any.
    """
    if type(loss) is not nn.CrossEntropyLoss or targets.is_floating_point():
        return None
    counts = targets != loss.ignore_index
    return None if values_may_be_checked(targets) and counts.all() else counts


def is_plain_cross_entropy(loss: Loss) -> bool:
    """Whether it is cross-entropy without class weights and smoothing."""
    return type(loss) is nn.CrossEntropyLoss and loss.weight is None and loss.label_smoothing == 0


def _distribution(logits: Tensor, targets: Tensor) -> Tensor:
    """Targets as probabilities ``[sample, class]``."""
    if targets.is_floating_point():
        return targets
    return torch.zeros_like(logits, requires_grad=False).scatter(1, targets.unsqueeze(1), 1.0)


def _cross_entropy_target_weights(loss: nn.CrossEntropyLoss, logits: Tensor, targets: Tensor) -> Tensor:
    """t_ik such that ℓ_i = −Σ_k t_ik log p_ik; zero for ignored samples."""
    num_classes = logits.shape[1]
    counts = samples_that_count(loss, targets)
    distribution = _distribution(logits, targets if counts is None else targets.where(counts, 0))
    class_weights = logits.new_ones(num_classes) if loss.weight is None else loss.weight.to(logits.dtype)
    smoothing = loss.label_smoothing
    weights = (1 - smoothing) * distribution * class_weights + smoothing / num_classes * class_weights
    return weights if counts is None else weights * counts.unsqueeze(1)


def _binary_cross_entropy_residuals(loss: nn.BCEWithLogitsLoss, logits: Tensor, targets: Tensor) -> Tensor:
    _check_broadcasts(loss, logits)
    probability = torch.sigmoid(logits)
    if loss.pos_weight is None:
        residuals = probability - targets
    else:
        residuals = (1 - targets) * probability - loss.pos_weight * targets * (1 - probability)
    if loss.weight is not None:
        residuals = residuals * loss.weight
    return residuals / logits.shape[1]


def _autograd_residuals(loss: Loss, logits: Tensor, targets: Tensor) -> Tensor:
    differentiable = logits.requires_grad and torch.is_grad_enabled()
    with torch.enable_grad():
        if not differentiable:
            logits = logits.detach().requires_grad_()
        losses = per_sample_losses(loss, logits, targets)
        (residuals,) = torch.autograd.grad(losses.sum(), logits, create_graph=differentiable)
    return residuals


def check_class_targets(loss: nn.CrossEntropyLoss, shape: torch.Size, targets: Tensor) -> None:
    """Raises InputError for targets that do not fit logits of a shape, or out of range where values may be checked."""
    num_samples, num_classes = shape
    expected = (num_samples, num_classes) if targets.is_floating_point() else (num_samples,)
    if targets.shape != expected:
        raise InputError(
            f"targets of cross-entropy must be integers [sample] = [{num_samples}] or probabilities [sample, class] = "
            f"[{num_samples}, {num_classes}], got {str(targets.dtype).removeprefix('torch.')} {list(targets.shape)}"
        )
    if targets.is_floating_point() or not values_may_be_checked(targets) or len(targets) == 0:
        return
    low, high = targets.aminmax()
    if low < 0 or high >= num_classes:
        out_of_range = ((targets < 0) | (targets >= num_classes)) & (targets != loss.ignore_index)
        if out_of_range.any():
            raise InputError(
                f"target {int(targets[out_of_range][0])} is out of range: the head has {num_classes} outputs, "
                f"so classes run from 0 to {num_classes - 1}"
            )


def _check_broadcasts(loss: nn.BCEWithLogitsLoss, logits: Tensor) -> None:
    for name, weight in (("weight", loss.weight), ("pos_weight", loss.pos_weight)):
        if weight is None:
            continue
        missing = logits.ndim - weight.ndim
        padded = (1,) * missing + tuple(weight.shape)
        if missing < 0 or any(size not in (1, full) for size, full in zip(padded, logits.shape, strict=True)):
            raise InputError(
                f"{name} of the binary loss must broadcast to the logits, {list(logits.shape)}, "
                f"got {list(weight.shape)}; for a weight of each sample give it the shape [{logits.shape[0]}, 1]"
            )


def _like_logits(targets: Tensor, logits: Tensor) -> Tensor:
    """Targets of binary or squared losses as ``[sample, class]`` in the type of the logits.

    Raises:
        InputError: targets are neither ``[sample, class]`` nor, for a single output, ``[sample]``.
    """
    if targets.shape == logits.shape[:1] and logits.shape[1] == 1:
        targets = targets.unsqueeze(1)
    if targets.shape != logits.shape:
        raise InputError(
            f"targets of a binary or squared loss must have the shape of the logits, {list(logits.shape)}, "
            f"got {list(targets.shape)}"
        )
    return targets.to(logits.dtype)
