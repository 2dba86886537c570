"""Risk and penalty in one operation against the operations that they are made of."""

import pytest
import torch
from torch import nn

import oracles
from fishr.functional import domain_gradient_variances, loss_residuals, variance_penalty
from fishr.functional.risk_and_penalty import risk_and_penalty

NUM_DOMAINS, SIZE, FEATURES, CLASSES = 3, 5, 4, 3


def draw(bias, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(NUM_DOMAINS * SIZE, FEATURES), (CLASSES, FEATURES), *([(CLASSES,)] if bias else [])]
    leaves = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    targets = torch.randint(CLASSES, (NUM_DOMAINS * SIZE,), generator=generator)
    history = torch.rand(NUM_DOMAINS, CLASSES, FEATURES + bias, generator=generator, dtype=dtype)
    return leaves, targets, history


def in_one(leaves, targets, history=0.0, reduction="mean"):
    features, weight, bias = (*leaves, None)[:3]
    return risk_and_penalty(features, weight, bias, targets, NUM_DOMAINS, history=history, reduction=reduction)


def in_parts(leaves, targets, history=0.0, reduction="mean"):
    features, weight, bias = (*leaves, None)[:3]
    logits = nn.functional.linear(features, weight, bias)
    residuals = loss_residuals(nn.CrossEntropyLoss(), logits, targets)
    sizes = (SIZE,) * NUM_DOMAINS
    variances = domain_gradient_variances(features, residuals, sizes, NUM_DOMAINS, bias=bias is not None)
    penalty = variance_penalty(variances + history, reduction=reduction)
    return nn.functional.cross_entropy(logits, targets), penalty, variances


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("past", [False, True], ids=["first step", "with history"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_the_same_as_in_parts(dtype, tolerance, bias, past, reduction):
    leaves, targets, history = draw(bias, dtype)
    history = history if past else 0.0
    ours, theirs = (way(leaves, targets, history, reduction) for way in (in_one, in_parts))
    assert not ours[2].requires_grad
    for actual, expected in zip(ours, theirs, strict=True):
        assert actual.dtype == dtype
        assert oracles.relative_error(actual, expected) <= tolerance
    for of_risk, of_penalty in ((1.0, 0.0), (0.0, 1.0), (0.3, 1.7)):
        gradients = [
            torch.autograd.grad(of_risk * way[0] + of_penalty * way[1], leaves, retain_graph=True)
            for way in (ours, theirs)
        ]
        assert oracles.relative_error(*gradients) <= tolerance


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_gradcheck(bias):
    leaves, targets, history = draw(bias)
    assert torch.autograd.gradcheck(lambda *inputs: in_one(inputs, targets, history)[:2], leaves)


@pytest.mark.parametrize("output", [0, 1], ids=["risk", "penalty"])
def test_each_is_differentiated_on_its_own_as_often_as_one_likes(output):
    leaves, targets, _ = draw(bias=True)
    ours, theirs = in_one(leaves, targets)[output], in_parts(leaves, targets)[output]
    for wanted in (leaves[:1], leaves[1:], leaves):
        expected = torch.autograd.grad(theirs, wanted, retain_graph=True)
        for _ in range(2):
            assert oracles.relative_error(torch.autograd.grad(ours, wanted, retain_graph=True), expected) <= 1e-12


def test_a_second_derivative_is_refused_and_not_wrong():
    leaves, targets, _ = draw(bias=True)
    with pytest.raises(RuntimeError, match="differentiable once, not with create_graph=True"):
        torch.autograd.grad(in_one(leaves, targets)[1], leaves, create_graph=True)


def test_far_logits_are_finite():
    leaves, targets, _ = draw(bias=True, dtype=torch.float32)
    with torch.no_grad():
        leaves[1] *= 1e4
    risk, penalty, _ = in_one(leaves, targets)
    gradients = torch.autograd.grad(risk + penalty, leaves)
    assert all(torch.isfinite(value).all() for value in (risk, penalty, *gradients))
