"""Statistics of the linear head, exact and in closed form."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fishr.analysis.statistics import Quantity, Statistics, spread, variance_spread
from fishr.data.base import Samples, network_input
from fishr.errors import DataError
from fishr.functional.hessian import head_gradients, hessian_diagonals, hessians
from fishr.functional.residuals import loss_residuals, per_sample_losses
from fishr.models.batch_context import evaluation_order
from fishr.models.saved import SavedModel

LARGEST_WHOLE = 1000
"""Weights up to which the whole Hessian is formed: 8 MB a domain."""


def loss_of(model: SavedModel) -> nn.Module:
    """The loss that a model was trained on: cross-entropy, of a single logit binary cross-entropy."""
    return nn.BCEWithLogitsLoss() if model.card.binary else nn.CrossEntropyLoss()


def correct(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether the most probable class of each sample is its own, bool ``[sample]``."""
    predictions = (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)
    return predictions == targets


@torch.no_grad()
def head_statistics(model: SavedModel, samples: Samples, batch_size: int) -> Statistics:
    """Statistics of the head's weight and bias over samples of one domain.

    The per-sample gradient is r_i ⊗ h_i (:mod:`fishr.functional.variance`), so that its powers are those of r_i and
    h_i, and the Hessian that of :mod:`fishr.functional.hessian`. The network runs in its own precision, the sums are
    float64. Memory is that of a batch, and of the statistics.

    Args:
        model: The model, in ``eval()`` mode.
        samples: At least 2 samples of one domain, with the model's classes as targets.
        batch_size: Samples that go through the network together.

    Raises:
        DataError: the loss is not finite.
    """
    loss, head = loss_of(model), model.classifier
    forms_whole = sum(weights.numel() for weights in head.parameters()) <= LARGEST_WHOLE
    n = len(samples.targets)
    means: dict[str, Tensor] = {}
    for features, targets in _features(model, samples, batch_size):
        logits, features = head(features).cpu().double(), features.cpu().double()
        r, sizes = loss_residuals(loss, logits, targets), (len(targets),)
        h = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
        p = torch.sigmoid(logits) if model.card.binary else torch.softmax(logits, dim=1)
        diagonal_square = (p * (1 - p)).square().sum(1)  # of A_i; ‖A_i‖² counts what is beside the diagonal too
        off_diagonal_square = p.square().sum(1).square() - p.pow(4).sum(1) if p.shape[1] > 1 else 0.0
        of_batch = {
            "risk": per_sample_losses(loss, logits, targets).mean(),
            "accuracy": correct(logits, targets).double().mean(),
            "gradient": head_gradients(features, r, sizes)[0],
            "fisher": head_gradients(features.square(), r.square(), sizes)[0],
            "third": head_gradients(features.pow(3), r.pow(3), sizes)[0],
            "fourth": (r.pow(4).sum(1) * h.pow(4).sum(1)).mean(),
            "square": (r.square().sum(1) * h.square().sum(1)).mean(),
            "hessian": hessian_diagonals(features, logits, sizes)[0],
            "hessian_square": (diagonal_square * h.pow(4).sum(1)).mean(),
            "whole_square": ((diagonal_square + off_diagonal_square) * h.square().sum(1).square()).mean(),
        }
        if forms_whole:
            of_batch["whole_hessian"] = hessians(features, logits, sizes)[0]
        for name, value in of_batch.items():
            means[name] = len(targets) / n * value + means.get(name, 0)
    if not means["risk"].isfinite():
        raise DataError(
            "the model's loss is not finite: its weights, or the inputs, have values that it cannot compute with"
        )
    order = _parameter_order(*means["hessian"].shape)
    gradient, fisher, third, hessian = (
        means[name].flatten()[order] for name in ("gradient", "fisher", "third", "hessian")
    )
    spreads: dict[Quantity, float] = {
        "gradient": spread(means["square"].item(), gradient, n),
        "variance": variance_spread(means["fourth"].item(), third, fisher, gradient, n),
        "fisher": spread(means["fourth"].item(), fisher, n),
        "hessian": spread(means["hessian_square"].item(), hessian, n),
    }
    whole = None
    if forms_whole:
        whole = means["whole_hessian"].reshape(len(order), -1)[order][:, order]
        spreads["whole_hessian"] = spread(means["whole_square"].item(), whole, n)
    risk, accuracy = means["risk"].item(), means["accuracy"].item()
    return Statistics(n, risk, accuracy, gradient, fisher, hessian, spreads, whole)


def _features(model: SavedModel, samples: Samples, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Features ``[sample, feature]`` and targets of each batch."""
    device = model.classifier.weight.device
    for batch in torch.split(evaluation_order(model.featurizer, len(samples.targets)), batch_size):
        yield model.featurizer(network_input(samples.inputs[batch], device)), samples.targets[batch]


def _parameter_order(num_classes: int, num_features: int) -> Tensor:
    """Where the head's weights, and then its biases, lie in a flattened ``[class, feature]`` with the bias last."""
    positions = torch.arange(num_classes * num_features).reshape(num_classes, num_features)
    return torch.cat([positions[:, :-1].flatten(), positions[:, -1]])
