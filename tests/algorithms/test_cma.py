"""CMA against explicit Hessians."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fishr.algorithms.cma import CMA
from fishr.data import DomainBatch
from fishr.errors import ConfigError
from oracles import relative_error

FEW, MANY = (2, 5, 4), (30, 12, 20)  # fewer samples than the head has weights, and more


def build(num_outputs: int, bias: bool, sizes: tuple[int, ...], **settings: float) -> tuple[CMA, DomainBatch]:
    torch.manual_seed(0)
    featurizer, head = nn.Sequential(nn.Linear(3, 14), nn.Tanh()), nn.Linear(14, num_outputs, bias=bias)
    algorithm = CMA(featurizer.double(), head.double(), len(sizes), CMA.Config(**settings), steps=100)
    targets = torch.randint(max(num_outputs, 2), (sum(sizes),))
    return algorithm, DomainBatch(torch.randn(sum(sizes), 3, dtype=torch.float64), targets, sizes)


def slow_objective(algorithm: CMA, data: DomainBatch, alpha: float, beta: float) -> Tensor:
    """Word for word, with the Hessian of each domain by double backward."""
    head = algorithm.classifier
    num_outputs, num_features = head.weight.shape
    flat = head.weight if head.bias is None else torch.cat([head.weight, head.bias.unsqueeze(1)], dim=1)
    gradients, hessians, losses = [], [], []
    for inputs, targets in zip(data.split(data.inputs), data.split(data.targets), strict=True):
        features = algorithm.featurizer(inputs)

        def risk(weights: Tensor, features: Tensor = features, targets: Tensor = targets) -> Tensor:
            bias = weights[:, num_features] if weights.shape[1] > num_features else None
            logits = F.linear(features, weights[:, :num_features], bias)
            if num_outputs == 1:
                return F.binary_cross_entropy_with_logits(logits[:, 0], targets.double())
            return F.cross_entropy(logits, targets)

        losses.append(len(targets) * risk(flat))
        gradients.append(torch.autograd.grad(risk(flat), flat, create_graph=True)[0])
        hessians.append(torch.autograd.functional.hessian(risk, flat, create_graph=True))

    def spread(values: list[Tensor]) -> Tensor:
        mean = sum(values) / len(values)
        return sum((value - mean).square().sum() for value in values) / len(values)

    penalty = alpha / num_outputs * spread(gradients) + beta / num_outputs**2 * spread(hessians)
    return sum(losses) / len(data.targets) + penalty


@pytest.mark.parametrize("sizes", [FEW, MANY], ids=["pairs of samples", "whole Hessians"])
@pytest.mark.parametrize(("num_outputs", "bias"), [(1, True), (3, True), (4, False)])
def test_objective(num_outputs: int, bias: bool, sizes: tuple[int, ...]) -> None:
    algorithm, data = build(num_outputs, bias, sizes, gradient_weight=3.0, hessian_weight=7.0)
    total, expected = algorithm.losses(data, 0).total, slow_objective(algorithm, data, 3.0, 7.0)
    assert relative_error(total, expected) < 1e-12
    gradients = [torch.autograd.grad(value, list(algorithm.parameters())) for value in (total, expected)]
    assert relative_error(*gradients) < 1e-11


def test_copies_of_a_domain_have_no_penalty() -> None:
    algorithm, data = build(3, True, (4, 4), gradient_weight=1.0, hessian_weight=1.0)
    data = DomainBatch(data.inputs[:4].repeat(2, 1), data.targets[:4].repeat(2), (4, 4))
    assert 0 <= algorithm.losses(data, 0).terms["penalty"] < 1e-15


def test_other_losses_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"CMA takes the Hessian in closed form, .*, got MSELoss: take"):
        CMA(nn.Identity(), nn.Linear(2, 3), 2, loss=nn.MSELoss())


def test_it_needs_two_domains() -> None:
    with pytest.raises(ConfigError, match="CMA compares domains and needs at least 2 to train on, got 1"):
        CMA(nn.Identity(), nn.Linear(2, 3), 1)
