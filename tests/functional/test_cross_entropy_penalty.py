"""The penalty of small batches in one operation against the operations that it is made of."""

import pytest
import torch
from torch import nn

import oracles
from fishr.functional import domain_gradient_variances, loss_residuals, variance_penalty
from fishr.functional.cross_entropy_penalty import cross_entropy_penalty

NUM_DOMAINS, SIZE, FEATURES, CLASSES = 3, 5, 4, 3


def draw(bias, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(NUM_DOMAINS * SIZE, FEATURES), (NUM_DOMAINS * SIZE, CLASSES)]
    leaves = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    targets = torch.randint(CLASSES, (NUM_DOMAINS * SIZE,), generator=generator)
    history = torch.rand(NUM_DOMAINS, CLASSES, FEATURES + bias, generator=generator, dtype=dtype)
    return leaves, targets, history


def in_one(leaves, targets, bias, history=0.0, reduction="mean"):
    return cross_entropy_penalty(*leaves, targets, NUM_DOMAINS, bias=bias, history=history, reduction=reduction)


def in_parts(leaves, targets, bias, history=0.0, reduction="mean"):
    features, logits = leaves
    residuals = loss_residuals(nn.CrossEntropyLoss(), logits, targets)
    variances = domain_gradient_variances(features, residuals, (SIZE,) * NUM_DOMAINS, NUM_DOMAINS, bias=bias)
    return variance_penalty(variances + history, reduction=reduction), variances


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("past", [False, True], ids=["first step", "with history"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_the_same_as_in_parts(dtype, tolerance, bias, past, reduction):
    leaves, targets, history = draw(bias, dtype)
    history = history if past else 0.0
    ours, theirs = (way(leaves, targets, bias, history, reduction) for way in (in_one, in_parts))
    assert not ours[1].requires_grad
    for actual, expected in zip(ours, theirs, strict=True):
        assert actual.dtype == dtype
        assert oracles.relative_error(actual, expected) <= tolerance
    gradients = [torch.autograd.grad(1.7 * way[0], leaves) for way in (ours, theirs)]
    assert oracles.relative_error(*gradients) <= tolerance


IGNORED = -100


def some_ignored(targets):
    """Other numbers of samples that count in each domain."""
    targets = targets.clone()
    targets[[0, 3, SIZE + 1]] = IGNORED
    return targets, targets != IGNORED


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_samples_that_do_not_count_leave_their_domain(bias):
    leaves, targets, history = draw(bias)
    targets, mask = some_ignored(targets)
    ours = cross_entropy_penalty(*leaves, targets, NUM_DOMAINS, bias=bias, mask=mask, history=history)
    residuals = loss_residuals(nn.CrossEntropyLoss(ignore_index=IGNORED), leaves[1], targets)
    sizes = (SIZE,) * NUM_DOMAINS
    variances = domain_gradient_variances(leaves[0], residuals, sizes, NUM_DOMAINS, bias=bias, mask=mask)
    theirs = variance_penalty(variances + history), variances
    for actual, expected in zip(ours, theirs, strict=True):
        assert oracles.relative_error(actual, expected) <= 1e-12
    gradients = [torch.autograd.grad(way[0], leaves) for way in (ours, theirs)]
    assert oracles.relative_error(*gradients) <= 1e-12
    assert not gradients[0][0][~mask].any()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_mask_of_all_samples_changes_nothing(bias):
    leaves, targets, history = draw(bias)
    ours = cross_entropy_penalty(*leaves, targets, NUM_DOMAINS, bias=bias, mask=targets >= 0, history=history)
    theirs = in_one(leaves, targets, bias, history)
    assert all(map(torch.equal, ours, theirs))
    gradients = [torch.autograd.grad(way[0], leaves) for way in (ours, theirs)]
    assert all(map(torch.equal, *gradients))


def test_gradcheck_with_a_mask():
    leaves, targets, history = draw(bias=True)
    targets, mask = some_ignored(targets)

    def penalty(*inputs):
        return cross_entropy_penalty(*inputs, targets, NUM_DOMAINS, bias=True, mask=mask, history=history)[0]

    assert torch.autograd.gradcheck(penalty, leaves)


def test_features_in_half_precision_are_widened():
    leaves, targets, _ = draw(bias=True, dtype=torch.float32)
    leaves[0] = leaves[0].detach().bfloat16().requires_grad_()
    ours, theirs = (way(leaves, targets, True) for way in (in_one, in_parts))
    assert ours[0].dtype == torch.float32
    assert oracles.relative_error(ours[0], theirs[0]) <= 1e-5
    gradients = [torch.autograd.grad(way[0], leaves) for way in (ours, theirs)]
    assert [of.dtype for of in gradients[0]] == [torch.bfloat16, torch.float32]
    assert oracles.relative_error(*gradients) <= 1e-2


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_gradcheck(bias):
    leaves, targets, history = draw(bias)
    assert torch.autograd.gradcheck(lambda *inputs: in_one(inputs, targets, bias, history)[0], leaves)


def test_it_is_differentiated_as_often_as_one_likes():
    leaves, targets, _ = draw(bias=True)
    ours, theirs = (way(leaves, targets, True)[0] for way in (in_one, in_parts))
    for wanted in (leaves[:1], leaves[1:], leaves):
        expected = torch.autograd.grad(theirs, wanted, retain_graph=True)
        for _ in range(2):
            assert oracles.relative_error(torch.autograd.grad(ours, wanted, retain_graph=True), expected) <= 1e-12


def test_a_second_derivative_is_refused_and_not_wrong():
    leaves, targets, _ = draw(bias=True)
    ours = torch.autograd.grad(in_one(leaves, targets, True)[0], leaves, create_graph=True)
    assert oracles.relative_error(ours, torch.autograd.grad(in_parts(leaves, targets, True)[0], leaves)) <= 1e-12
    with pytest.raises(RuntimeError, match="the Fishr penalty is differentiable once"):
        torch.autograd.grad(ours[0].sum() + leaves[0].square().sum(), leaves)


def test_a_graph_is_used_once_unless_it_is_retained():
    leaves, targets, _ = draw(bias=True)
    penalty, _ = in_one(leaves, targets, True)
    torch.autograd.grad(penalty, leaves)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(penalty, leaves)


def test_a_backward_pass_within_autocast_changes_nothing():
    leaves, targets, _ = draw(bias=True, dtype=torch.float32)
    expected = torch.autograd.grad(in_one(leaves, targets, True)[0], leaves)
    penalty, _ = in_one(leaves, targets, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = torch.autograd.grad(penalty, leaves)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_small_gradients_in_half_precision_survive_a_scaled_loss():
    leaves, targets, _ = draw(bias=True, dtype=torch.float32)
    leaves[0] = (1e-2 * leaves[0]).half().detach().requires_grad_()
    scale = 65536.0 * 1000
    ours, theirs = (torch.autograd.grad(scale * way(leaves, targets, True)[0], leaves) for way in (in_one, in_parts))
    assert ours[0].dtype == torch.float16
    assert ours[0].abs().max() > 0
    assert oracles.relative_error(ours[0].float(), theirs[0].float()) <= 1e-2


def test_a_history_in_double_precision():
    leaves, targets, history = draw(bias=True, dtype=torch.float32)
    ours, theirs = (way(leaves, targets, True, history.double()) for way in (in_one, in_parts))
    assert oracles.relative_error(ours[0], theirs[0]) <= 1e-5
    gradients = [torch.autograd.grad(way[0], leaves) for way in (ours, theirs)]
    assert oracles.relative_error(*gradients) <= 1e-5


def test_far_logits_are_finite():
    leaves, targets, _ = draw(bias=True, dtype=torch.float32)
    leaves[1] = (leaves[1] * 1e4).detach().requires_grad_()
    penalty, _ = in_one(leaves, targets, True)
    gradients = torch.autograd.grad(penalty, leaves)
    assert all(torch.isfinite(value).all() for value in (penalty, *gradients))
