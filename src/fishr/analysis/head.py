"""Statistics of the linear head, exact and in closed form."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fishr.analysis.statistics import Statistics
from fishr.data.base import Samples, network_input
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

    The per-sample gradient is r_i ⊗ h_i (:mod:`fishr.functional.variance`), the Hessian that of
    :mod:`fishr.functional.hessian`. The network runs in its own precision, the sums are float64. Memory is that of a
    batch, and of the statistics.

    Args:
        model: The model, in ``eval()`` mode.
        samples: Samples of one domain, with the model's classes as targets.
        batch_size: Samples that go through the network together.
    """
    loss, head = loss_of(model), model.classifier
    forms_whole = sum(weights.numel() for weights in head.parameters()) <= LARGEST_WHOLE
    num_samples, risk, accuracy = len(samples.targets), 0.0, 0.0
    sums: dict[str, Tensor] = {}
    for features, targets in _features(model, samples, batch_size):
        share, sizes = len(targets) / num_samples, (len(targets),)
        logits, features = head(features).cpu().double(), features.cpu().double()
        residuals = loss_residuals(loss, logits, targets)
        risk += share * per_sample_losses(loss, logits, targets).mean().item()
        accuracy += share * correct(logits, targets).double().mean().item()
        # The second moment of r ⊗ h is the mean of r² ⊗ h², which is what the first function takes the mean of.
        means = {
            "gradient": head_gradients(features, residuals, sizes)[0],
            "fisher": head_gradients(features.square(), residuals.square(), sizes)[0],
            "hessian": hessian_diagonals(features, logits, sizes)[0],
        }
        if forms_whole:
            means["whole_hessian"] = hessians(features, logits, sizes)[0]
        for name, mean in means.items():
            sums[name] = share * mean + sums.get(name, 0)
    order = _parameter_order(*sums["hessian"].shape)
    diagonals = {name: sums[name].flatten()[order] for name in ("gradient", "fisher", "hessian")}
    whole = sums["whole_hessian"].reshape(len(order), -1)[order][:, order] if forms_whole else None
    return Statistics(num_samples, risk, accuracy, **diagonals, whole_hessian=whole)


def _features(model: SavedModel, samples: Samples, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Features ``[sample, feature]`` and targets of each batch."""
    device = model.classifier.weight.device
    for batch in torch.split(evaluation_order(model.featurizer, len(samples.targets)), batch_size):
        yield model.featurizer(network_input(samples.inputs[batch], device)), samples.targets[batch]


def _parameter_order(num_classes: int, num_features: int) -> Tensor:
    """Where the head's weights, and then its biases, lie in a flattened ``[class, feature]`` with the bias last."""
    positions = torch.arange(num_classes * num_features).reshape(num_classes, num_features)
    return torch.cat([positions[:, :-1].flatten(), positions[:, -1]])
