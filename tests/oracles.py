"""Slow, obviously right versions of the mathematics, to compare the library with.

Definitions word for word: a gradient for each sample by torch.func, loops over domains, covariances as full
matrices. Nothing here uses the library.

Shapes: features ``[sample, feature]``, targets and domains ``[sample]``, gradients
``[sample, class, feature]``, with one more feature, the last, when there is a bias.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap

Loss = nn.Module | Callable[[Tensor, Tensor], Tensor]


def sample_loss(loss: Loss, logits: Tensor, target: Tensor) -> Tensor:
    """ℓ_i of one sample, from its logits ``[class]``: torch's own loss on a batch of one, not normalised."""
    if type(loss) is nn.CrossEntropyLoss:
        return F.cross_entropy(
            logits.unsqueeze(0),
            target.unsqueeze(0),
            weight=loss.weight,
            ignore_index=loss.ignore_index,
            label_smoothing=loss.label_smoothing,
            reduction="sum",
        )
    if type(loss) is nn.BCEWithLogitsLoss:
        return F.binary_cross_entropy_with_logits(
            logits, target.reshape(logits.shape), weight=loss.weight, pos_weight=loss.pos_weight, reduction="sum"
        ) / len(logits)
    if type(loss) is nn.MSELoss:
        return (logits - target.reshape(logits.shape)).square().sum() / len(logits)
    return loss(logits.unsqueeze(0), target.unsqueeze(0)).squeeze(0)


def residuals(loss: Loss, logits: Tensor, targets: Tensor) -> Tensor:
    """∂ℓ_i/∂logits_i, sample by sample."""
    return vmap(grad(lambda z, y: sample_loss(loss, z, y)))(logits, targets)


def head_gradients(loss: Loss, features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """g_i: the gradient of ℓ_i with respect to the head's weight and bias, sample by sample."""

    def loss_of(weight: Tensor, bias: Tensor, feature: Tensor, target: Tensor) -> Tensor:
        return sample_loss(loss, weight @ feature + bias, target)

    zero = weight.new_zeros(len(weight))
    per_sample = vmap(grad(loss_of, argnums=(0, 1)), in_dims=(None, None, 0, 0))
    of_weight, of_bias = per_sample(weight, zero if bias is None else bias, features, targets)
    return of_weight if bias is None else torch.cat([of_weight, of_bias.unsqueeze(2)], dim=2)


def network_gradients(
    loss: Loss, network: Callable[[Tensor], Tensor], weights: Sequence[Tensor], inputs: Tensor, targets: Tensor
) -> list[Tensor]:
    """g_i of some weights of any network, ``[sample, ...]`` each: every sample alone through the network."""
    gradients = []
    for sample, target in zip(inputs, targets, strict=True):
        value = sample_loss(loss, network(sample.unsqueeze(0)).squeeze(0), target)
        gradients.append(torch.autograd.grad(value, weights, create_graph=True, materialize_grads=True))
    return [torch.stack(of_weight) for of_weight in zip(*gradients, strict=True)]


def outer_gradients(features: Tensor, residuals: Tensor, *, bias: bool) -> Tensor:
    """g_i from features and residuals alone: r_i ⊗ [f_i; 1], each sample written out."""
    gradients = []
    for f, r in zip(features, residuals, strict=True):
        h = torch.cat([f, f.new_ones(1)]) if bias else f
        gradients.append(torch.outer(r, h))
    return torch.stack(gradients)


def of_domain(values: Tensor, domains: Tensor, domain: int, mask: Tensor | None) -> Tensor:
    belongs = domains == domain
    return values[belongs if mask is None else belongs & mask]


def variances(
    gradients: Tensor, domains: Tensor, num_domains: int, *, centered: bool = True, mask: Tensor | None = None
) -> Tensor:
    """Biased elementwise variance (or second moment) over the samples of each domain."""
    statistics = []
    for domain in range(num_domains):
        g = of_domain(gradients, domains, domain, mask)
        if centered:
            g = g - g.mean(0)
        statistics.append(g.square().sum(0) / len(g))
    return torch.stack(statistics)


def moving_average(values: Sequence[Tensor], decay: float) -> Tensor:
    """What enters the penalty after these steps: ema/(1 − γ), ema = γ ema + (1 − γ) value, the past detached."""
    ema = torch.zeros_like(values[0])
    for value in values[:-1]:
        ema = decay * ema + (1 - decay) * value.detach()
    ema = decay * ema + (1 - decay) * values[-1]
    return ema / (1 - decay)


def penalty(statistics: Tensor, reduction: str) -> Tensor:
    """Squared distance to the mean over domains: mean over domains and parameters, or sum over both."""
    mean = sum(statistics) / len(statistics)
    distances = [(statistic - mean).square() for statistic in statistics]
    if reduction == "mean":
        return sum(distance.mean() for distance in distances) / len(distances)
    return sum(distance.sum() for distance in distances)


def covariances(
    parameter_gradients: Tensor, domains: Tensor, num_domains: int, *, mask: Tensor | None = None
) -> Tensor:
    """Full covariance ``[domain, entry, entry]`` of one parameter tensor's gradients, divided by n · p."""
    matrices = []
    for domain in range(num_domains):
        g = of_domain(parameter_gradients.flatten(1), domains, domain, mask)
        centred = g - g.mean(0)
        matrices.append(sum(torch.outer(row, row) for row in centred) / (len(g) * g.shape[1]))
    return torch.stack(matrices)


def covariance_distance(
    gradients: Tensor, domains: Tensor, num_domains: int, *, bias: bool, mask: Tensor | None = None
) -> Tensor:
    """The off-diagonal variant: weight with weight, bias with bias, summed squared distance to the mean."""
    tensors = [gradients[..., :-1], gradients[..., -1:]] if bias else [gradients]
    return sum(penalty(covariances(tensor, domains, num_domains, mask=mask), "sum") for tensor in tensors)


def relative_error(actual: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor]) -> float:
    """Largest difference relative to the largest expected entry, of all tensors when there are several."""
    if not isinstance(actual, Tensor):
        assert [tensor.shape for tensor in actual] == [tensor.shape for tensor in expected]
        actual, expected = (torch.cat([t.double().flatten() for t in tensors]) for tensors in (actual, expected))
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = expected.abs().max()
    assert scale > 0, "the expected tensor is all zero: nothing to be relative to"
    return float((actual - expected).abs().max() / scale)
