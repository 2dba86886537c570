"""Residuals: closed forms and the autograd fallback against the gradient of each sample's loss."""

import re

import pytest
import torch
from torch import nn

import oracles
from cases import LOSSES, TOLERANCE, draw_batch, dtypes, log_cosh_loss
from fishr.errors import InputError
from fishr.functional import loss_residuals, per_sample_losses, samples_that_count


@pytest.mark.parametrize("dtype", dtypes, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_residuals_are_the_gradients_of_each_samples_loss(name, dtype):
    batch = draw_batch(name, dtype)
    logits = batch.logits.detach().requires_grad_()
    actual = loss_residuals(batch.loss, logits, batch.targets)
    expected = oracles.residuals(batch.loss, logits, batch.targets)
    assert actual.dtype == dtype
    assert oracles.relative_error(actual, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", dtypes, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_through_residuals(name, dtype):
    batch = draw_batch(name, dtype)
    logits = batch.logits.detach().requires_grad_()
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    actual, expected = (
        torch.autograd.grad(residuals(batch.loss, logits, batch.targets), logits, direction)[0]
        for residuals in (loss_residuals, oracles.residuals)
    )
    assert oracles.relative_error(actual, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    batch = draw_batch(name, sizes=(2, 3))
    logits = batch.logits.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss_residuals(batch.loss, z, batch.targets), logits)


@pytest.mark.parametrize("name", LOSSES)
def test_per_sample_losses(name):
    batch = draw_batch(name)
    expected = torch.stack(
        [oracles.sample_loss(batch.loss, z, y) for z, y in zip(batch.logits, batch.targets, strict=True)]
    )
    actual = per_sample_losses(batch.loss, batch.logits, batch.targets)
    assert oracles.relative_error(actual, expected) <= 1e-12


@pytest.mark.parametrize("name", LOSSES)
def test_a_residual_does_not_depend_on_the_other_samples(name):
    batch = draw_batch(name)
    whole = loss_residuals(batch.loss, batch.logits, batch.targets)
    for i in (0, 1, 5):
        alone = loss_residuals(batch.loss, batch.logits[i : i + 1], batch.targets[i : i + 1])
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=0, atol=1e-14)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (nn.CrossEntropyLoss, "cross-entropy"),
        (nn.BCEWithLogitsLoss, "binary, many outputs"),
        (nn.MSELoss, "squared"),
    ],
)
def test_the_reduction_of_a_module_is_not_used(kind, name, reduction):
    batch = draw_batch(name)
    actual = loss_residuals(kind(reduction=reduction), batch.logits, batch.targets)
    assert oracles.relative_error(actual, oracles.residuals(kind(), batch.logits, batch.targets)) <= 1e-12


def test_a_subclass_is_asked_for_its_own_losses():
    class Halved(nn.CrossEntropyLoss):
        def forward(self, logits, targets):
            return super().forward(logits, targets) / 2

    batch = draw_batch("cross-entropy")
    actual = loss_residuals(Halved(reduction="none"), batch.logits, batch.targets)
    expected = loss_residuals(nn.CrossEntropyLoss(), batch.logits, batch.targets) / 2
    assert oracles.relative_error(actual, expected) <= 1e-12


@pytest.mark.parametrize("name", ["ignore_index", "all combined"])
def test_ignored_samples_have_no_residual_and_do_not_count(name):
    batch = draw_batch(name)
    counts = samples_that_count(batch.loss, batch.targets)
    assert torch.equal(counts, batch.mask)
    assert 0 < counts.sum() < len(counts)
    residuals = loss_residuals(batch.loss, batch.logits, batch.targets)
    assert torch.equal(residuals[~counts], torch.zeros_like(residuals[~counts]))
    assert (residuals[counts] != 0).all()


@pytest.mark.parametrize("name", ["soft targets", "binary, many outputs", "squared", "callable"])
def test_losses_that_ignore_none(name):
    batch = draw_batch(name)
    assert samples_that_count(batch.loss, batch.targets) is None


def test_far_logits_give_finite_residuals_and_gradients():
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    for loss, targets, expected in (
        (nn.CrossEntropyLoss(), torch.tensor([0, 0]), [[0.0, 0.0], [-1.0, 1.0]]),
        (nn.BCEWithLogitsLoss(), torch.tensor([[1.0, 0.0], [1.0, 0.0]]), [[0.0, 0.0], [-0.5, 0.5]]),
        (nn.BCEWithLogitsLoss(pos_weight=torch.full((2,), 3.0)), torch.ones(2, 2), [[0.0, -1.5], [-1.5, 0.0]]),
    ):
        residuals = loss_residuals(loss, logits, targets)
        assert torch.equal(residuals.detach(), torch.tensor(expected))
        (gradient,) = torch.autograd.grad(residuals.sum(), logits)
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("name", ["cross-entropy", "callable"])
def test_without_gradients_the_values_are_the_same(name):
    batch = draw_batch(name)
    expected = loss_residuals(batch.loss, batch.logits, batch.targets)
    assert expected.requires_grad
    with torch.no_grad():
        unrecorded = loss_residuals(batch.loss, batch.logits, batch.targets)
    detached = loss_residuals(batch.loss, batch.logits.detach(), batch.targets)
    for actual in (unrecorded, detached):
        assert not actual.requires_grad
        assert torch.equal(actual, expected.detach())


def test_logits_that_are_not_a_matrix():
    with pytest.raises(InputError, match=r"logits must be \[sample, class\], got \[6\]"):
        loss_residuals(nn.BCEWithLogitsLoss(), torch.zeros(6), torch.zeros(6))


@pytest.mark.parametrize("function", [loss_residuals, per_sample_losses])
def test_a_loss_that_returns_a_scalar(function):
    message = r"one value for each sample, \[sample\] = \[6\], but returned a scalar; pass reduction='none'"
    with pytest.raises(InputError, match=message):
        function(lambda z, y: log_cosh_loss(z, y).mean(), torch.zeros(6, 4), torch.zeros(6, 4))


def test_a_loss_that_returns_one_value_for_each_entry():
    with pytest.raises(InputError, match=r"\[sample\] = \[6\], but returned a tensor \[6, 4\]"):
        loss_residuals(nn.SmoothL1Loss(reduction="none"), torch.zeros(6, 4), torch.zeros(6, 4))


@pytest.mark.parametrize("loss", [nn.BCEWithLogitsLoss(), nn.MSELoss()], ids=["binary", "squared"])
@pytest.mark.parametrize(("outputs", "targets"), [(4, (6,)), (4, (6, 3)), (1, (5,)), (1, (6, 1, 1))])
def test_targets_of_another_shape_than_the_logits(loss, outputs, targets):
    came = str(list(targets)).removesuffix("]")  # [5] may be called [5, 1]
    message = re.escape(f"must have the shape of the logits, [6, {outputs}], got {came}")
    with pytest.raises(InputError, match=message):
        loss_residuals(loss, torch.zeros(6, outputs), torch.zeros(targets))


# Shapes and values that do not fit


@pytest.mark.parametrize("function", [loss_residuals, per_sample_losses])
@pytest.mark.parametrize(
    "targets", [torch.zeros(1).long(), torch.zeros(5, 1).long(), torch.zeros(1, 3), torch.zeros(5, 4)], ids=str
)
def test_class_targets_of_another_shape(function, targets):
    message = r"integers \[sample\] = \[5\] or probabilities \[sample, class\] = \[5, 3\], got (int64|float32) "
    with pytest.raises(InputError, match=message):
        function(nn.CrossEntropyLoss(), torch.zeros(5, 3), targets)


@pytest.mark.parametrize("function", [loss_residuals, per_sample_losses])
@pytest.mark.parametrize("target", [-1, 3])
def test_a_class_out_of_range(function, target):
    targets = torch.tensor([0, -100, target])
    with pytest.raises(InputError, match=f"target {target} is out of range: the head has 3 outputs"):
        function(nn.CrossEntropyLoss(), torch.zeros(3, 3), targets)


@pytest.mark.parametrize("function", [loss_residuals, per_sample_losses])
def test_a_binary_weight_that_would_widen_the_logits(function):
    loss = nn.BCEWithLogitsLoss(weight=torch.ones(5))
    with pytest.raises(InputError, match=r"must broadcast to the logits, \[5, 1\], got \[5\].* shape \[5, 1\]"):
        function(loss, torch.zeros(5, 1), torch.zeros(5))


@pytest.mark.parametrize("function", [loss_residuals, per_sample_losses])
@pytest.mark.parametrize("loss", [nn.BCEWithLogitsLoss(), nn.MSELoss()], ids=repr)
def test_binary_targets_of_another_length(function, loss):
    with pytest.raises(InputError, match=r"shape of the logits, \[5, 1\], got \[4\]"):
        function(loss, torch.zeros(5, 1), torch.zeros(4))


def test_a_positive_weight_that_would_widen_the_logits():
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.ones(4))
    with pytest.raises(InputError, match=r"pos_weight of the binary loss must broadcast to the logits, \[4, 1\]"):
        loss_residuals(loss, torch.zeros(4, 1), torch.zeros(4))


def test_a_weight_that_does_not_broadcast_at_all():
    loss = nn.BCEWithLogitsLoss(weight=torch.ones(5))
    with pytest.raises(InputError, match=r"^weight of the binary loss must .* logits, \[4, 3\], got \[5\]"):
        loss_residuals(loss, torch.zeros(4, 3), torch.zeros(4, 3))


def test_a_callable_that_returns_a_number():
    with pytest.raises(InputError, match=r"one value for each sample.* returned a scalar"):
        per_sample_losses(lambda logits, targets: 0.5, torch.zeros(4, 3), torch.zeros(4))
